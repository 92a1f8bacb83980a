"""Tiny random models of many architectures, written as Hugging Face folders in well under a second each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.tiny import VOCABULARY, tiny_tokenizer

# 32 is the smallest head size that vLLM supports on CPUs.
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_GLM_EXPERTS = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}

# By name: the model type of transformers and differences from _SIZES. Logit scales and caps are not
# 1, and biases are present wherever possible: any omitted operation must change the log-probs.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, biases and tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "Mistral": ("mistral", {"sliding_window": 16}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen2-MoE": ("qwen2_moe", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "Qwen3-MoE": ("qwen3_moe", {**_EXPERTS, "num_experts": 4}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 2.0}),
    "Gemma 3": ("gemma3_text", {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "Phi": ("phi", {"num_key_value_heads": 2}),
    "Phi-3": ("phi3", {}),
    "GPT-2": ("gpt2", {"n_inner": 96}),
    "GPT-Neo": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-J": ("gptj", {"rotary_dim": 16, "n_inner": 96}),
    "GPT-BigCode": ("gpt_bigcode", {"n_inner": 96}),
    "StarCoder2": ("starcoder2", {"sliding_window": None}),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "BLOOM": ("bloom", {}),
    "Falcon": ("falcon", {"alibi": False, "multi_query": True, "new_decoder_architecture": False}),
    "MPT": ("mpt", {"expansion_ratio": 2}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "Cohere 2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 16}),
    "StableLM": ("stablelm", {"use_qkv_bias": True}),
    "OLMo 2": ("olmo2", {}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4 (0414)": ("glm4", {}),
    "GLM": ("glm", {}),
    "GLM-4-MoE": ("glm4_moe", {**_GLM_EXPERTS, "head_dim": 32, "first_k_dense_replace": 1}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            **_GLM_EXPERTS,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 2,
            "q_lora_rank": 32,
            # vLLM's latent attention has kernels only for these two.
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
    "Granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "Apertus": ("apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "SmolLM3": ("smollm3", {}),
    "Persimmon": ("persimmon", {}),
    "Nemotron": ("nemotron", {}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Seed-OSS": ("seed_oss", {}),
    "EXAONE 4": ("exaone4", {"sliding_window": 16}),
    "Falcon-H1": (
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 16, "lm_head_multiplier": 0.25},
    ),
    "RecurrentGemma": (
        "recurrent_gemma",
        {"lru_width": 64, "num_hidden_layers": 3, "attention_window_size": 16, "logits_soft_cap": 2.0},
    ),
    "Mamba": ("mamba", {"state_size": 8}),
}


def tiny_config(name: str) -> PreTrainedConfig:
    model_type, options = FAMILIES[name]
    names = _option_names(model_type)
    return AutoConfig.for_model(model_type, **{key: value for key, value in _SIZES.items() if key in names} | options)


def tiny_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in evaluation mode. All parameters and buffers differ from their initial values:
    a bias of zero or a norm of one would hide that it is not used."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    buffers = dict(model.named_buffers())
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            is_constant = name in buffers and bool(tensor.any())  # of an activation, such as an epsilon
            tensor.mul_(1 + 0.1 * noise).add_(noise, alpha=0.0 if is_constant else 0.1)
    model.tie_weights()
    return model.eval()


def tiny_folder(name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes such a model, with the tokenizer of tests.tiny, to `folder`."""
    model = tiny_model(name, seed=seed).to(dtype)
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _option_names(model_type: str) -> set[str]:
    kind = CONFIG_MAPPING[model_type]
    return {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
