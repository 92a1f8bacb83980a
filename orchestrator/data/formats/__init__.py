"""One row of one format -> canonical messages and replies.

A row that does not fit raises BadRow, which the readers gather; a row that fits but teaches nothing (chosen equals
rejected) raises LeftOut, which they count.
"""
