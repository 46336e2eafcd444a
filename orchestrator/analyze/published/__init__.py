"""The report on the published scores: statistics, verdicts, tables, pictures and overlays of own studies."""
