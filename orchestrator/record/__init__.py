"""What is kept: the store of records and its projections to Parquet and MLflow."""
