"""How a study runs on Ray: the driver, trials, the broker, trainers and searches."""
