"""Searchers, samplers and their budgets."""
