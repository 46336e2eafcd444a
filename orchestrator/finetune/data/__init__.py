"""Tokenized datasets, cached on disk, and batches of them."""
