"""What people judge: sources, the choice of what to ask, and how items get into a store."""
