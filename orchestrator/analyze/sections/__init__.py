"""The sections of a report: which pictures, tables and texts each shows."""
