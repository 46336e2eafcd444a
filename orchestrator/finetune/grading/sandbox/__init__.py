"""Run programs that a model wrote, without access to anything else."""
