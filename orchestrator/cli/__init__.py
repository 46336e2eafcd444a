"""The command line: the program `lora-orchestrator`, its commands and their options."""
