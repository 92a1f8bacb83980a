"""The only place with Ray actors, torch, DeepSpeed and vLLM: implements the roles of orchestrator/roles.py."""

from orchestrator.garbage import collect_seldom

# Ray imports an actor's module before anything of ours runs in its process; Process goes back to the usual.
collect_seldom()
