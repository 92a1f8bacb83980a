"""Where roles run, what they take, and how long: pure functions."""
