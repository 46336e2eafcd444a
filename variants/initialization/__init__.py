"""Variants that change where training starts."""
