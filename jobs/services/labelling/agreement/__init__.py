"""How far people agree: on pairs of replies, by Krippendorff's alpha, and so much that they must be one person."""
