"""Studies on another cluster: --on cluster.yaml."""
