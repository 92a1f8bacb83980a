"""Ray's side of the roles: groups of actors, their start, failures and restarts."""
