"""What `ray job submit` runs: one module per command, and the builder that wires the parts."""
