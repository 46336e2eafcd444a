"""Small helpers that every other package may import: errors, files, signals, redaction."""
