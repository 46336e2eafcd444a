"""Statistics, plots and reports, made from records alone."""
