"""What a run would take: time, memory, money."""
