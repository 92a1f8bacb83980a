"""Implements the Protocols of orchestrator/roles.py, which the coordinator uses, over groups of actors."""
