"""Statistics on plain arrays: no records, no text. docs/statistics.md says why each rule is what it is."""
