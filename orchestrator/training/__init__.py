"""What trainings compute with, in numpy: batches, learning rates, calibration, ensembles."""
