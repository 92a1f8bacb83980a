"""Transfer of weights from the policy to the engines, and its verification."""
