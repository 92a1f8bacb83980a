"""`rlhf label`: a service in which people judge replies, its store and its page (docs/labelling.md)."""
