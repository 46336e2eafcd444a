"""Variants that change what updates a layer can express."""
