"""Ray Tune's trials and schedulers."""
