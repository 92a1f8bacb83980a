"""How weights travel from the policy to the engines, and the proof that they arrived."""
