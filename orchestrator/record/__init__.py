"""The store of records, and what is derived from it.

Start with `schema` (a record; its fields are the columns of all tables), `store` (one JSON file a record) and
`study_file` (`study.json`). `tables`, `mlflow` and `other_trackers` derive Parquet files and runs from the
records; `tracker` has the threads that write them during a study. `show` prints a record, `maintenance` is gc
and sync.
"""
