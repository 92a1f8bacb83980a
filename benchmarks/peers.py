"""Compares published step times of other frameworks with simulated ones. Nothing is fitted to them.

NeMo-RL 0.4, docs/about/performance-summary.md: GRPO on OpenMathInstruct-2, DGX-H100, bf16, Megatron. Batches,
checkpointing and nodes from its recipes (examples/configs/recipes/llm/performance). Response lengths are its "G-Average
Seq len"; prompt lengths follow from its tokens/s/GPU: 1,562 × 97.7 s × 16 / 2,048 - 1,060 = 132, 110 for Qwen3-32B.

DeepSpeed-Chat, blogs/deepspeed-chat/README.md of microsoft/DeepSpeed, tables 1 and 2 with footnote 1: PPO of OPT with
critic and reward OPT-350M; 131.9k queries of 256 tokens, answers of 256, batches of 1,024: 129 steps, on A100 80GB.

Assumed for both, because not published: the standard deviation of response lengths is half their mean unless all are
equal; engines use all GPU memory but 40 % that is free of weights for the cache; scoring is distributed evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.costs import Dimensions, LearnSettings
from orchestrator.planning.hardware import DEVICES
from orchestrator.planning.simulation.run import simulate
from orchestrator.planning.simulation.scenario import MODELS, Layout, Pool, Spread, Work

DEVIATION = 0.5
ENGINE_MEMORY = 0.6
_DEEPSPEED_CHAT_STEPS = 131_900 / 1024

_LLAMA_8B = Dimensions(8_030_261_248, 32, 4096, 14336, 128_256, kv_width=1024, tied=False)
_QWEN_32B = Dimensions(32_762_123_264, 64, 5120, 25600, 151_936, kv_width=1024, tied=False)
_OPT_350M = Dimensions(331_196_416, 24, 1024, 4096, 50_272, kv_width=1024, tied=True)
_OPT_7B = Dimensions(6_658_473_984, 32, 4096, 16384, 50_272, kv_width=4096, tied=True)
_OPT_13B = Dimensions(12_853_473_280, 40, 5120, 20480, 50_272, kv_width=5120, tied=True)


@dataclass(frozen=True)
class Published:
    """A setup, and its published seconds per step."""

    name: str
    step_s: float
    work: Work
    layout: Layout


def predicted_s(published: Published) -> float:
    """Simulated seconds per step."""
    layout, size = published.layout, published.work.policy
    width = layout.width("rollout")
    free = ENGINE_MEMORY * width * layout.device.memory_bytes - size.weight_bytes
    tokens = max(free / size.cache_bytes_per_token, 1.0)
    return simulate(published.work, layout, cache_tokens=tokens).step_s


def mean_after_cut(mean: float, longest: int) -> Spread:
    """The spread whose lengths have this mean after the cut at `longest`."""
    low, high = mean, 50.0 * mean
    while high - low > 1.0:
        middle = (low + high) / 2
        short = Spread(middle, longest, DEVIATION).draw(20_000, (0,)).mean() < mean
        low, high = (middle, high) if short else (low, middle)
    return Spread(high, longest, DEVIATION)


def nemo(
    name: str, step_s: float, size: Dimensions, response: float, *, prompt: int, gpus: int, width: int
) -> Published:
    """On policy: all roles on all GPUs. One step off policy: half of the GPUs sample."""
    off = "off" in name
    work = Work(
        {"policy": size, "reference": size, "critic": None, "reward": None},
        2048,
        Spread(prompt, prompt),
        mean_after_cut(response, 4096 - prompt),
    )
    learners = gpus // 2 if off else gpus
    models = dict.fromkeys(MODELS, learners)
    pools = (
        (Pool(gpus // 2, {"rollout": width}), Pool(learners, models))
        if off
        else (Pool(gpus, {**models, "rollout": width}),)
    )
    engines = pools[0].devices // width
    learning = LearnSettings(
        zero_stage=1, minibatches=4, micro_batch_tokens=4096, gradient_checkpointing=size is _LLAMA_8B
    )
    layout = Layout(
        DEVICES["h100"],
        pools,
        engines,
        2048 // engines,
        int(off),
        learning=dict.fromkeys(MODELS, learning),
        deals_on=True,
    )
    return Published(f"NeMo-RL {name}, {gpus} H100", step_s, work, layout)


def deepspeed_chat(name: str, hours: float, size: Dimensions, *, gpus: int) -> Published:
    small = {"critic": _OPT_350M, "reward": _OPT_350M}
    work = Work({"policy": size, "reference": size, **small}, 1024, Spread(256, 256), Spread(256, 256))
    learning = LearnSettings(zero_stage=3, micro_batch_tokens=8192, gradient_checkpointing=True)
    pools = (Pool(gpus, dict.fromkeys(MODELS, gpus) | {"rollout": 1}),)
    layout = Layout(DEVICES["a100"], pools, gpus, 1024 // gpus, learning=dict.fromkeys(MODELS, learning), deals_on=True)
    return Published(f"DeepSpeed-Chat {name}, {gpus} A100", hours * 3600 / _DEEPSPEED_CHAT_STEPS, work, layout)


def published() -> list[Published]:
    return [
        nemo("Llama 3.1 8B, on policy", 97.7, _LLAMA_8B, 1060, prompt=132, gpus=16, width=1),
        nemo("Llama 3.1 8B, 1 step off", 74.6, _LLAMA_8B, 1129, prompt=132, gpus=16, width=1),
        nemo("Qwen3 32B, on policy", 393.0, _QWEN_32B, 3206, prompt=110, gpus=32, width=4),
        nemo("Qwen3 32B, 1 step off", 215.0, _QWEN_32B, 3207, prompt=110, gpus=64, width=4),
        deepspeed_chat("OPT-6.7B", 4.1, _OPT_7B, gpus=8),
        deepspeed_chat("OPT-13.2B", 9.0, _OPT_13B, gpus=8),
        deepspeed_chat("OPT-13.2B", 1.25, _OPT_13B, gpus=64),
    ]
