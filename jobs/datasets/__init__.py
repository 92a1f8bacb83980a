"""`rlhf data`: shows what a data file holds, and writes it in the canonical form."""
