"""Image classification tasks on datasets of the hub."""
