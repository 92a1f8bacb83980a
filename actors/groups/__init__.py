"""Ray's side of the roles: groups of actors, how they start, fail and start again."""
