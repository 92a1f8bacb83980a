"""Record formats: each converts a row to canonical messages and replies.

A row that does not fit raises BadRow, which readers collect. A well-formed row without information (chosen equals
rejected) raises LeftOut, which they count.
"""
