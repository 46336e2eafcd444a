"""What is to be tried: configurations, search spaces, grids and the options of a study."""
