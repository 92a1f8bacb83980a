"""Attention for lines of several rows, and on CPUs with a fast backward for short rows in bf16.

Rows of one line are computed row by row on CPUs, and on GPUs by torch's kernel for rows of different lengths
(Dao 2023, FlashAttention-2), which needs no other package.

For short sequences, torch's CPU kernel spends most of its time in the backward: 16 rows of 57 tokens and 9 heads in
bf16 take 20 ms forward and backward, 9 ms here. From about 150 tokens on torch's kernel is faster. Forward is torch's
kernel, so that learning and scoring agree. In fp32 torch's kernel is never slower at 32 to 384 tokens, and up
to 1.9 times faster with AVX-512 and 1.4 times with AVX2.

Shapes: B rows, H heads, G key-value heads, T tokens, K head size (that of the values may be another).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_short"
SHORT = 128
SHORT_MASKED = 384
_LARGEST_HEAD = 256
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class ShortCausalAttention(torch.autograd.Function):
    """softmax(Q Kᵀ · scale, masked) V; backward as in Dao 2022, appendix B.2, without tiles.

    `visible_B1TT`: the keys that a query sees; None: causal.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTK: Tensor,
        key_BGTK: Tensor,
        value_BGTK: Tensor,
        scale: float,
        visible_B1TT: Tensor | None = None,
    ) -> Tensor:
        out_BHTK = scaled_dot_product_attention(
            query_BHTK,
            key_BGTK,
            value_BGTK,
            attn_mask=visible_B1TT,
            is_causal=visible_B1TT is None,
            scale=scale,
            enable_gqa=True,
        )
        ctx.save_for_backward(query_BHTK, key_BGTK, value_BGTK, out_BHTK)
        ctx.visible, ctx.scale = visible_B1TT, scale
        return out_BHTK

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> Any:
        query, key, value, out = ctx.saved_tensors
        (rows, heads, length, size), groups = query.shape, key.shape[1]
        # The heads of a group share keys and values, so their queries are treated like additional tokens.
        query, grad, out = (x.reshape(rows, groups, -1, x.shape[-1]) for x in (query, grad_BHTK, out))
        if ctx.visible is None:
            hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
        else:
            hidden = ctx.visible.logical_not().unsqueeze(1)
        scores = (query @ key.mT).float().mul_(ctx.scale).view(rows, groups, -1, length, length)
        p = scores.masked_fill_(hidden, -torch.inf).softmax(-1).flatten(2, 3)
        grad_p = (grad @ value.mT).float()
        correction = (grad.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = grad_p.sub_(correction).mul_(p).mul_(ctx.scale).to(query.dtype)
        grad_query = (grad_scores @ key).view(rows, heads, length, size)
        return grad_query, grad_scores.mT @ query, p.to(query.dtype).mT @ grad, None, None


def attend(
    module: torch.nn.Module,
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers; unsupported cases use transformers' own.

    With `cu_seq_lens_q` (actors/learning/documents.py) each row of the line is computed as if it were alone.
    """
    bounds = options.get("cu_seq_lens_q")
    if bounds is not None and _has_kernel_for_rows(query_BHTK, value_BGTK):
        return _rows_of_one_line(query_BHTK, key_BGTK, value_BGTK, bounds, options["max_length_q"], scaling), None
    if bounds is not None:
        sizes = bounds.diff().tolist()
        rest = {name: value for name, value in options.items() if name not in _BOUNDS}
        parts = zip(*(x.split(sizes, dim=2) for x in (query_BHTK, key_BGTK, value_BGTK)), strict=True)
        rows = [attend(module, q, k, v, None, dropout, scaling, **rest)[0] for q, k, v in parts]
        return torch.cat(rows, dim=1), None
    length = query_BHTK.shape[2]
    is_ours = (
        torch.is_grad_enabled()
        and query_BHTK.device.type == "cpu"
        and query_BHTK.dtype == torch.bfloat16
        and length == key_BGTK.shape[2] <= (SHORT if attention_mask is None else SHORT_MASKED)
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and not dropout
        and options.get("is_causal") in (None, True)
        and getattr(module, "is_causal", True)
        and all(options.get(name) is None for name in ("position_bias", "cache"))
    )
    if not is_ours:
        return sdpa_attention_forward(
            module, query_BHTK, key_BGTK, value_BGTK, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scale = query_BHTK.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHTK = ShortCausalAttention.apply(query_BHTK, key_BGTK, value_BGTK, scale, attention_mask)
    return out_BHTK.transpose(1, 2).contiguous(), None


def _has_kernel_for_rows(query_BHTK: Tensor, value_BGTK: Tensor) -> bool:
    """Whether FlashAttention-2 takes these: half precision, heads of at most 256 numbers, Ampere or newer."""
    return (
        query_BHTK.is_cuda
        and query_BHTK.dtype in (torch.bfloat16, torch.float16)
        and query_BHTK.shape[-1] == value_BGTK.shape[-1] <= _LARGEST_HEAD
        and torch.cuda.get_device_capability(query_BHTK.device) >= (8, 0)
    )


def _rows_of_one_line(
    query_1HTK: Tensor, key_1GTK: Tensor, value_1GTK: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    """(1, T, H, K): causal attention in each row between two bounds."""
    query_THK, key_TGK, value_TGK = (x[0].transpose(0, 1) for x in (query_1HTK, key_1GTK, value_1GTK))
    out_THK: Any = varlen_attn(
        query_THK,
        key_TGK,
        value_TGK,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query_THK.shape[1] != key_TGK.shape[1],
    )
    out_1THK: Tensor = out_THK.unsqueeze(0)
    return out_1THK


def has_full_attention(language_model: Any) -> bool:
    """Whether all layers have attention, and without windows."""
    config = language_model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    return not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def states_of(language_model: Any, tokens: Sequence[int], **more: Any) -> Tensor:
    """The decoder's states of one line of tokens, in fp32."""
    device = next(language_model.parameters()).device
    decoder = language_model.get_decoder()
    found: Tensor = decoder(input_ids=torch.tensor([tokens], device=device), use_cache=False, **more)[0]
    return found[0].float()


def use_short_attention(model: Any) -> None:
    """Makes a model that uses torch's attention kernel use this one for short sequences in bf16."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
