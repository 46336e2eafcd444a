"""The machines of a cluster: checks of all nodes, the watcher of spot machines, and the stack on AWS."""
