"""What a run reports: metrics, events, guards, heartbeat."""
