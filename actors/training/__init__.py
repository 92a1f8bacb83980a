"""Stages without rollouts, on Ray Train."""
