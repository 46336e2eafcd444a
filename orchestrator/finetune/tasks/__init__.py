"""Tasks: examples, how they become a model's inputs, metrics and grading."""
