"""What the coordinator holds: the Protocols of orchestrator/roles.py over groups of actors."""
