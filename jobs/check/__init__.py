"""What a run would meet, found out before it starts."""
