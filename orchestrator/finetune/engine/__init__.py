"""The fine-tuning loop and the state of its lanes."""
