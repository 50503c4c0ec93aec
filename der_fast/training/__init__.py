"""Learning classes step by step: protocols, stages, memory, checkpoints and the learner."""
