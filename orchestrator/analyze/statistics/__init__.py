"""Statistical methods on NumPy arrays. docs/statistics.md explains the choice of each method."""
