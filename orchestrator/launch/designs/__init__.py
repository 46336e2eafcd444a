"""Designs of single experiment scripts."""
