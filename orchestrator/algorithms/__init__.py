"""The mathematics of PPO: arrays in, arrays out."""
