"""Variants that change how the update is scaled or optimized."""
