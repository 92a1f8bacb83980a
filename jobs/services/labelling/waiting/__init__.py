"""Batches whose judgements somebody waits for."""
