"""Placement, memory and time of roles: pure functions."""
