"""The designs of the experiment scripts."""
