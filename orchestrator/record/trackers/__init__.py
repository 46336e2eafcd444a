"""Programs and services that show the runs of a study: W&B, TensorBoard, and the interface for others."""
