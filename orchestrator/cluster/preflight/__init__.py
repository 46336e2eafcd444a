"""Checks of a cluster before a study costs anything."""
