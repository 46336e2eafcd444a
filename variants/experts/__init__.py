"""Variants with several adapters per layer and a router that weighs them."""
