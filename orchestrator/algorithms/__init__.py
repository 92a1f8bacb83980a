"""Algorithms, and the mathematics around them: arrays in, arrays out."""
