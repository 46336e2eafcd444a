"""The rented machines: what must be known of them before, and apart from, Ray."""
