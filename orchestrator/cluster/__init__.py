"""The machines of a cluster: checks before a study, remote commands, processes on every node."""
