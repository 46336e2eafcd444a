"""Variants of several adapters between which a router chooses."""
