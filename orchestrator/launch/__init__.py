"""From a study's options to its report."""
