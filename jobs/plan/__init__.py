"""Estimates of a run's time, memory and price."""
