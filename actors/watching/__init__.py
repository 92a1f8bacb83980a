"""Measurements of actors, and the destinations of metrics."""
