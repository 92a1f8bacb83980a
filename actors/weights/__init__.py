"""Transfer of weights from the policy to the engines, and proof of their arrival."""
