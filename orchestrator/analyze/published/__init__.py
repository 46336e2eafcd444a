"""The page of the published scores: statistics, verdicts, tables, pictures and an overlay of own studies."""
