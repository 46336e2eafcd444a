"""The store of records, and what is derived from it."""
