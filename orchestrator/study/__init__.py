"""Definition of a study: configurations, search spaces, grids and options."""
