"""Tasks that follow instructions."""
