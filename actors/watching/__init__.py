"""What actors measure, and where metrics are sent."""
