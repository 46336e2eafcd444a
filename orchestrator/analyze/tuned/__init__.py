"""Replicated tuning: whole tunings of every variant, compared with the baseline's in the same replicate."""
