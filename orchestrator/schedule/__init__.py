"""Ray: the trial, the broker, the seat, the run of a study."""
