"""The command line: options, and the commands of `python -m orchestrator`."""
