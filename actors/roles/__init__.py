"""The classes of the actors."""
