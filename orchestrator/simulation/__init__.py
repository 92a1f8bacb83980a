"""The real coordinator over simulated roles, under virtual time: what a run would take, before there is one."""
