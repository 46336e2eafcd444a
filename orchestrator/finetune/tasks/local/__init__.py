"""Tasks whose data are made on this machine or come in packages."""
