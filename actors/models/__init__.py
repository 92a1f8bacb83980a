"""Models of transformers: found, loaded, proved to be what we rely on, made faster, exported."""
