"""Sensitivity analysis: effects of hyperparameters on the score, from the records of a star design."""
