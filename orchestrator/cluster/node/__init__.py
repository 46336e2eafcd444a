"""Processes that run on the nodes of cluster.yaml."""
