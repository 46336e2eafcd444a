"""Where base models and datasets come from."""
