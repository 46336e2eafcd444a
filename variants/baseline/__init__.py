"""The reference that the others are compared with."""
