"""From records to an answer: curves, intervals, plots, the report."""
