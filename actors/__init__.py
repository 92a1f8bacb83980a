"""The only place with Ray actors, torch, DeepSpeed and vLLM: implements the roles of orchestrator/roles.py."""
