"""Variants that change the rank of the update or the number of parameters per rank."""
