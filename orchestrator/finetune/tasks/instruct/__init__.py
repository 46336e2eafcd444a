"""Tasks with generated answers whose rows need code; their settings are in `tasks.toml`."""
