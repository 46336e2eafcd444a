"""Whether a cluster is fit for a study, found out before money is spent."""
