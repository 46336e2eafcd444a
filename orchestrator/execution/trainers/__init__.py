"""Ray Train runs that hold a base model and train lanes."""
