"""Sums of the rows of weights, of which digests are made (actors.weights.digest).

factors     pseudo-random factors
words       on the host, by the compiled loops of kernels
products    on GPUs, and where numba is not installed
"""
