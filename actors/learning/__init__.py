"""Models that learn: loading, packing, losses, and the sharded learner. No Ray here."""
