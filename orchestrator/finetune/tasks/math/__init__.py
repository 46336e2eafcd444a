"""Tasks of grade-school mathematics."""
