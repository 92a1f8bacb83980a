"""The configuration: one frozen tree that also defines all defaults."""
