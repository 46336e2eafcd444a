"""The actor between trials and trainers."""
