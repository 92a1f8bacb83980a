"""Explains what failed first in a run, and how to continue."""
