"""Everything that knows Ray: trials, the broker, trainers and searches."""
