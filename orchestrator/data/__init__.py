"""Reading prompts and preferences: one canonical record inside, readers for many formats outside.

records    PromptRecord, RankingRecord: what everything else works with
files      a file as a stream of rows: JSONL, JSON array, Parquet; plain, gzip or zstd; any pyarrow filesystem
formats    one row of one format -> canonical records
readers    read_prompts, read_rankings: bad rows gathered, duplicates counted
"""
