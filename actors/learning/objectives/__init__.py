"""Loss functions, and the objectives of algorithms that are made of them."""
