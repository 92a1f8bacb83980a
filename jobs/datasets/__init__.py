"""`rlhf data`: shows the content of a data file, and writes it in the canonical form."""
