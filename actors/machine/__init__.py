"""The machine of the processes: its speed and its allocator."""
