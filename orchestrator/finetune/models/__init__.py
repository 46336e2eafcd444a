"""Base models: loading, checks, and changes of architectures for several lanes."""
