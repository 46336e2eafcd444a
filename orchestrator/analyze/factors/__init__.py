"""Which hyperparameter matters: effects of factors from the records of a star design."""
