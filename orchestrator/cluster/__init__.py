"""The rented machines: what is known of them, set up and watched apart from Ray."""
