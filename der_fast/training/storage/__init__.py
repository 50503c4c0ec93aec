"""What a run writes and reads: the learner, checkpoints, history."""
