"""Algorithms and their mathematics: pure functions of arrays."""
