"""Fine-tuning in one process: lanes in, reports and records out. Imports no Ray."""
