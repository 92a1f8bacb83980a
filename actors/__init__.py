"""The only place with Ray actors, torch, DeepSpeed and vLLM: implements the roles of orchestrator/roles.py."""

from orchestrator.garbage import collect_seldom

# Ray imports an actor's module before it creates the actor; Process later changes this setting.
collect_seldom()
