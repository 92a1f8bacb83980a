"""Reading data: canonical records inside, readers for many formats outside.

records    PromptRecord, DemonstrationRecord, RankingRecord, ...: what everything else works with
rows       a file as a stream of rows: JSONL, JSON array, Parquet, text; plain, gzip or zstd; any pyarrow filesystem
formats    one row of one format -> canonical records
kinds      which formats each kind of record is read from
streams    the records of a file one by one: bad rows gathered, duplicates counted
readers    a whole file in memory, for one that is known to be short
"""
