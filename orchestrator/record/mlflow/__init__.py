"""MLflow runs made from records."""
