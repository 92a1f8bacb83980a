"""The configuration: one frozen tree, its defaults in one place."""
