"""Loss functions, and the objectives of algorithms that combine them."""
