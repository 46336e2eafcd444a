"""Scores of lanes: forward passes, generation and metrics."""
