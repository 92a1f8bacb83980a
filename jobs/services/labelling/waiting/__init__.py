"""Batches: what is asked for, who waits for it, and what was given."""
