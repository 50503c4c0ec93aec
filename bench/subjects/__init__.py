"""What is measured, and its rivals."""
