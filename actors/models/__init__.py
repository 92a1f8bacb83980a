"""Models of transformers: finding, loading, checking, accelerating and exporting them."""
