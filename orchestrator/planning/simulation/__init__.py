"""The loop over simulated roles in virtual time."""
