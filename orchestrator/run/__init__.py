"""The folder of a run: attempts, experience log, checkpoints, mirror."""
