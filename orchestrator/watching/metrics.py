"""The catalogue of metrics: the same names in the JSONL file, in trackers, in Prometheus and in the docs.

`to_markdown` generates `docs/metrics.md` from METRICS; a test compares both.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ROLES = ("policy", "reference", "reward", "critic", "rollout")
PHASES: Mapping[str, str] = MappingProxyType(
    {
        "generate": "sampling, from the step's start until its shards go to the scorers",
        "score": "waiting for shards and for the four scorers",
        "commit": "assembling experience and writing it durably",
        "learn": "policy and critic updates",
        "publish": "sending new weights to all engines and verifying them",
        "save": "saving a checkpoint, during sampling",
        "evaluate": "evaluating on held-out prompts",
    }
)

When = Literal["every step", "evaluation", "reward_model stage", "people stage"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: as recorded; `<name>` is a placeholder for a name from the run's config.
        help: description, in one sentence without a final period.
        unit: unit of the value; "1" for shares and other dimensionless numbers.
        kind: gauge (the value of this step) or counter (a total over the run).
        when: the lines of metrics.jsonl that contain it.
    """

    name: str
    help: str
    unit: str = "1"
    kind: Literal["gauge", "counter"] = "gauge"
    when: When = "every step"

    @property
    def is_template(self) -> bool:
        return "<" in self.name


def _rewards() -> Iterable[Metric]:
    yield Metric("reward/mean", "Mean sequence reward of the step's samples, before the KL penalty", "reward")
    yield Metric("reward/std", "Standard deviation of the sequence rewards", "reward")
    yield Metric("reward/min", "Lowest sequence reward", "reward")
    yield Metric("reward/max", "Highest sequence reward", "reward")
    yield Metric("reward/part/<name>", "Mean of one part of the reward over the samples that have it", "reward")
    yield Metric("reward/failed", "Samples dropped because their reward failed", "samples")
    yield Metric("reward/failed_fraction", "Share of the step's samples whose reward failed")
    yield Metric("reward/cut", "Samples cut at the start for the reward model (reward.max_length)", "samples")


def _samples() -> Iterable[Metric]:
    yield Metric("kl/per_response", "Mean over responses of the KL to the reference, summed over tokens (k1)", "nats")
    yield Metric("kl/per_token", "KL of the policy to the reference, mean over response tokens (k1)", "nats")
    yield Metric("kl/per_token_k3", "The same with the k3 estimator, which is never negative", "nats")
    yield Metric("kl/coefficient", "Weight of the KL penalty in this step")
    yield Metric("kl/beyond_bound", "Share of tokens whose |log-ratio to the reference| is above 20, the bound of k3")
    yield Metric("filter/prompts_sampled", "Prompts sampled for the step (algorithm.filter_rounds)", "prompts")
    yield Metric("filter/prompts_kept", "Those that are learned from", "prompts")
    yield Metric("response/length_mean", "Mean response length in learned tokens, including EOS", "tokens")
    yield Metric("response/length_std", "Standard deviation of the response length", "tokens")
    yield Metric("response/length_min", "Shortest response", "tokens")
    yield Metric("response/length_max", "Longest response", "tokens")
    yield Metric("response/turns_mean", "Mean number of the policy's turns, if a sample has several", "turns")
    yield Metric("response/cut_by_length", "Share of responses truncated at rollout.max_new_tokens, or unfinished")
    yield Metric("response/without_eos", "Share of responses that end without EOS")
    yield Metric("engine/mismatch", "Mean |log-prob of the learner - log-prob of the engine| of sampled tokens", "nats")
    yield Metric("engine/mismatch_max", "Largest |log-prob of the learner - log-prob of the engine|", "nats")
    yield Metric("engine/mismatch_k3", "KL of the engine to the learner on sampled tokens (k3)", "nats")
    yield Metric("advantage/mean", "Mean advantage over response tokens, before whitening", "reward")
    yield Metric("advantage/std", "Standard deviation of the advantages, before whitening", "reward")
    yield Metric("advantage/min", "Lowest advantage, before whitening", "reward")
    yield Metric("advantage/max", "Highest advantage, before whitening", "reward")


def _learning() -> Iterable[Metric]:
    yield Metric("policy/loss", "Policy loss, mean over the step's optimizer steps")
    yield Metric("policy/entropy", "Entropy of the policy's token distribution, mean over response tokens", "nats")
    yield Metric("policy/clip_fraction", "Share of tokens whose ratio is clipped")
    yield Metric("policy/approx_kl", "KL of the policy before the step to the updated policy (k3)", "nats")
    bounded = "Share of tokens whose |log-ratio new / old| is above 20, where the loss clips it"
    yield Metric("policy/ratio_bounded_fraction", bounded)
    yield Metric("policy/dual_clip_fraction", "Share of tokens that algorithm.dual_clip bounds")
    yield Metric("policy/importance_weight_mean", "Mean importance weight between learner and engine")
    yield Metric("policy/importance_capped_fraction", "Share of tokens whose importance weight is at its cap")
    yield Metric("policy/importance_masked_fraction", "Share of tokens whose importance weight is masked")
    yield Metric("policy/gate_closed_fraction", "Share of tokens that algorithm.gate leaves out")
    yield Metric("policy/ratio_max", "Largest probability ratio new / old of a token")
    yield Metric("critic/loss", "Value loss, mean over the step's optimizer steps")
    yield Metric("critic/clip_fraction", "Share of tokens whose value is clipped")
    explained = (
        "1 - Var(returns - values) / Var(returns), before the update; without a critic, values are group baselines"
    )
    yield Metric("critic/explained_variance", explained)
    for role in ("policy", "critic"):
        yield Metric(f"{role}/grad_norm", "Gradient norm before clipping, mean over optimizer steps")
        yield Metric(f"{role}/learning_rate", "Learning rate of the step's last optimizer step")


def _cost() -> Iterable[Metric]:
    for phase, what in PHASES.items():
        yield Metric(f"time/{phase}_s", f"Wall time with at least one task in this phase: {what}", "seconds")
    yield Metric("time/step_s", "Wall time of the step", "seconds")
    for role in ROLES:
        yield Metric(f"busy/{role}_s", "Seconds of the step in which the role computed (mean of its actors)", "seconds")
        yield Metric(f"idle/{role}", "Share of the step in which the role did not compute: 1 - busy / step")
    yield Metric("tokens/generated", "Response tokens sampled for this step", "tokens")
    yield Metric("tokens/learned", "Learned response tokens of this step, times epochs", "tokens")
    yield Metric("tokens/generated_per_s", "tokens/generated over time/generate_s", "tokens/second")
    yield Metric("tokens/learned_per_s", "tokens/learned over time/learn_s", "tokens/second")
    yield Metric("tokens/total", "Response tokens of all steps of the run so far", "tokens", "counter")
    yield Metric("publish/tensors_verified", "Weight tensors compared on each engine after publishing", "tensors")
    yield Metric("publish/verify_s", "Part of publishing: digests and reading back, on the slowest engine", "s")
    yield Metric("publish/apply_s", "Part of publishing: loading and packing weights, on the slowest engine", "s")
    yield Metric("publish/bytes", "Bytes of published weights", "bytes")
    for role in (*ROLES, "coordinator"):
        yield Metric(f"memory/{role}_rss_bytes", "Resident memory of the role's largest process", "bytes")
    yield Metric("telemetry/non_finite", "Metrics of this line that were NaN or infinite, written as null")


def _beside_steps() -> Iterable[Metric]:
    evaluation: When = "evaluation"
    yield Metric("evaluation/gold_mean", "Mean gold score of held-out responses", "gold", when=evaluation)
    yield Metric("evaluation/gold_std", "Standard deviation of the gold scores", "gold", when=evaluation)
    yield Metric("evaluation/reward_mean", "Mean training reward of held-out responses", "reward", when=evaluation)
    what = "Held-out samples cut at the start for the reward model"
    yield Metric("evaluation/reward_cut", what, "samples", when=evaluation)
    yield Metric("evaluation/kl_per_response", "KL to the reference on held-out responses", "nats", when=evaluation)
    yield Metric("evaluation/length_mean", "Mean length of held-out responses", "tokens", when=evaluation)
    yield Metric(
        "evaluation/failed", "Held-out responses without a gold score, excluded from the means", when=evaluation
    )
    stage: When = "reward_model stage"
    yield Metric("reward_model/loss", "Ranking loss", when=stage)
    yield Metric("reward_model/accuracy", "Share of training pairs ordered correctly", when=stage)
    yield Metric("reward_model/held_out_accuracy", "Share of held-out pairs ordered correctly", when=stage)
    yield Metric("reward_model/grad_norm", "Gradient norm before clipping", when=stage)
    yield Metric("reward_model/learning_rate", "Learning rate", when=stage)


def _people() -> Iterable[Metric]:
    stage: When = "people stage"
    yield Metric("people/waiting", "1 while the run waits for judgements of people, 0 afterwards", when=stage)
    yield Metric("people/items", "Items that people are asked to judge", "items", when=stage)
    yield Metric("people/judgements", "Judgements of these items", "judgements", when=stage)
    yield Metric("people/missing", "Judgements for which the run waits", "judgements", when=stage)
    yield Metric("people/seconds_left", "Time until people.deadline_hours; absent without it", "seconds", when=stage)
    yield Metric("people/agreement", "Share of pairs of replies on which two people agree, in all rounds", when=stage)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for part in (_rewards, _samples, _learning, _cost, _beside_steps, _people)
        for metric in part()
    }
)


def lookup(name: str) -> Metric | None:
    """The catalogue's entry of a recorded name (`reward/part/style` matches `reward/part/<name>`), or None."""
    if name in METRICS:
        return METRICS[name]
    templates = (metric for metric in METRICS.values() if metric.is_template)
    return next((metric for metric in templates if name.startswith(metric.name.partition("<")[0])), None)


def prometheus_name(name: str) -> str:
    """`reward/mean` becomes `rlhf_reward_mean`; counters end in `_total`.

    A checksum keeps names with characters other than letters, digits, `_` and `/` distinct.
    """
    plain = re.sub(r"[^a-zA-Z0-9_]", "_", name)
    if re.search(r"[^a-zA-Z0-9_/]", name):
        plain += f"_{zlib.crc32(name.encode()):08x}"
    entry = lookup(name)
    is_counter = entry is not None and entry.kind == "counter"
    return f"rlhf_{plain}" + ("_total" if is_counter and not plain.endswith("_total") else "")


def to_markdown() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Generated from `orchestrator/watching/metrics.py`; change it there.",
        "",
        "Each step appends one line to `metrics.jsonl` in the run folder: `stage`, `kind`, `step`, `attempt`, `time` "
        "and `metrics`. Phase seconds count from the previous line; overlapping phases each count in full. NaN and "
        "infinite values are written as null and counted in `telemetry/non_finite`.",
        "",
        "The coordinator's Prometheus endpoint (`telemetry.prometheus_port`) shows the newest value of each metric "
        "under its Prometheus name, with the label `run_id`. Its address is in `prometheus.json` in the run folder, a "
        "file for `file_sd_configs`, which allows wildcards only in file names. It also shows "
        "`rlhf_steps_total` (steps finished by this process) and `rlhf_run_info` "
        "(labels `run_id`, `attempt`). `rlhf_tokens_total` counts from the start of the process; "
        "`tokens/total` in the file counts over the whole run.",
    ]
    for when, title in _SECTIONS.items():
        lines += ["", f"## {title}", "", "| metric | unit | meaning | Prometheus |", "|---|---|---|---|"]
        for metric in METRICS.values():
            if metric.when == when:
                exposed = prometheus_name(metric.name) if not metric.is_template else "rlhf_reward_part_<name>"
                lines.append(f"| `{metric.name}` | {metric.unit} | {_cell(metric.help)} | `{exposed}` |")
    lines += ["", *_ACTOR_METRICS, ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_SECTIONS: Mapping[When, str] = {
    "every step": "Every step",
    "evaluation": "Every evaluation",
    "reward_model stage": "Reward-model stage",
    "people stage": "Stage that waits for people, at the endpoint while it waits",
}

ACTOR_METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("rlhf_actor_rss_bytes", "Resident memory of the actor's process", "bytes"),
            Metric("rlhf_actor_busy_seconds", "Seconds of computation by the actor", "seconds", "counter"),
            Metric("rlhf_actor_tokens", "Tokens that the actor sampled, scored or learned", "tokens", "counter"),
            Metric("rlhf_actor_weights_version", "Version of the policy's weights on an engine"),
        )
    }
)

_ACTOR_METRICS = [
    "## Actors, through Ray's metrics agents",
    "",
    "Tags `run_id`, `role`, `rank`. Ray adds the prefix `ray_`, and `_total` to counters. Counters of ended processes "
    "remain until the node's agent ends: use `rate()` and `sum by (run_id, role)`.",
    "",
    "| metric | unit | meaning |",
    "|---|---|---|",
    *(
        f"| `ray_{metric.name}{'_total' if metric.kind == 'counter' else ''}` | {metric.unit} | {metric.help} |"
        for metric in ACTOR_METRICS.values()
    ),
]
