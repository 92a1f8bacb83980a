"""A data file as rows of fields: JSONL, JSON array, Parquet, text, data sets of the hub."""
