"""What failed first in a run, and how to go on."""
