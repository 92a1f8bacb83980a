"""Simulated labellers, in this process and over HTTP."""
