"""Shapes of exported judgements. A new one is a function and a line of the table (table.py)."""
