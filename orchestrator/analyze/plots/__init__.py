"""The static pictures of a report (matplotlib)."""
