"""What the processes know about their machine: its speed, its allocator."""
