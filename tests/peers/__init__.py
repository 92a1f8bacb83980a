"""The losses and advantages of verl and OpenRLHF, from their wheels: what ours are compared with."""
