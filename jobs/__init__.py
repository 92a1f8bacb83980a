"""What `ray job submit` runs: one module per command, and the builder that wires the parts."""

import sys

from jobs import stops

if sys.argv[:1] == ["-m"]:  # `python -m jobs.COMMAND` is importing the command; run_command takes over from here
    stops.end_at_once()
