"""The coordinator and all that it decides with; imports no ray, torch, vllm, deepspeed or transformers."""
