"""What `ray job submit` runs: one module per command (commands.py), and the builder that wires the parts."""

import sys

from jobs import stops

# `python -m jobs COMMAND` or `rlhf COMMAND` is importing the command; run_command takes over from here.
if sys.argv[:1] == ["-m"] or "".join(sys.argv[:1]).endswith("/rlhf"):
    stops.end_at_once()
