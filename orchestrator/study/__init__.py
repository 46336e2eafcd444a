"""What is to be tried. Plain Python: imports neither torch nor ray."""
