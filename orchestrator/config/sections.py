"""Sections of the configuration that stages share, and their defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.config.base import (
    Dtype,
    Fraction,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Seconds,
    Section,
    one_of,
)
from orchestrator.data.formats.prompts import PROMPT_FORMATS
from orchestrator.data.formats.rankings import RANKING_FORMATS
from orchestrator.errors import ConfigError


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")
    """Name of the run; its id is this name and the start time."""
    id: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9-]{0,60}$")
    """Run id. Given: the run with this id is continued, or started under it."""
    root: Path = Path("runs")
    """Folder that holds run folders; on a cluster it must be the same storage on every node."""
    mirror: str | None = None
    """Other storage that keeps a copy of the run, such as s3://bucket/prefix or an absolute path. When the run folder
    is lost, `run.id` and this make it again."""
    mirror_every_s: Seconds = 60.0
    """Time between copies; what is newer is lost with the folder."""
    cache: Path = Path("~/.cache/rlhf-orchestrator")
    """Folder for converted models; safe to delete."""
    grace_s: Seconds = 30.0
    """Time to save where a run stands when it is stopped. Less than what Kubernetes or Ray give before they kill."""
    seed: int = 1
    """Seed of the run; all randomness derives from it."""
    contents: Mapping[str, str] = {}
    """Digests of the files that the run reads: prompts, preferences, models, chat template, rules. Written when a run
    starts; what is given here is not read."""
    accept_changed_files: bool = False
    """Whether to continue a run although files changed under their paths since its last attempt."""


class ModelConfig(Section):
    path: str = "smollm2-135m-instruct"
    """Policy to start from: a folder, a Hugging Face name, or the embedded smollm2-135m-instruct."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of all models and engines. Learners keep fp32 master weights. auto: bfloat16 on GPUs; on CPUs the
    type that is measured to be faster, chosen when a run starts and kept for it."""
    max_length: Positive = 512
    """Window in tokens: prompt and response together."""
    chat_template: Path | None = None
    """File with a Jinja chat template for the policy, instead of its tokenizer's own. Exported with the policy."""
    today: date | None = None
    """Date that chat templates tell which write one. Null: the day on which the run starts."""
    system_prompt: str | None = None
    """System message set before every conversation that has none, for the policy and, unless its folder says how it
    was trained, for the reward model. Null: the chat template's own default."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with a model."""

    @property
    def compute_dtype(self) -> Dtype:
        """The resolved `dtype`. Raises ConfigError while it is auto."""
        if self.dtype == "auto":
            raise ConfigError("model.dtype is still auto here; give bfloat16 or float32 (jobs.resolve chooses one).")
        return self.dtype


class PromptsConfig(Section):
    path: Path = Path("jobs/data/quickstart_prompts.jsonl")
    """Prompts: JSONL, JSON or Parquet, plain or gzip/zstd."""
    format: Annotated[str, one_of(PROMPT_FORMATS, "auto")] = "auto"
    """Record format: prompt, messages, hh-rlhf, alpaca, question; auto decides by the first record's fields."""
    limit: Positive | None = None
    """Read at most this many records."""
    max_prompt_tokens: Positive = 256
    """Longer prompts are left out, counted and listed."""
    held_out_fraction: Fraction = 0.2
    """Share of prompts kept for evaluation, chosen by a hash of the prompt."""
    reward_model_fraction: Fraction = 0.4
    """Share of prompts used to train the reward model, chosen by the same hash."""


class LabellerConfig(Section):
    gold: str = "actors.rewards.gold:vader_positivity"
    """Rule function (dotted name) that stands in for a person; no model ever sees its score."""
    noise_std: NonNegativeNumber = 0.1
    """Standard deviation of the noise added to a score before replies are ranked."""
    prompts: Positive = 256
    """Prompts to sample replies for."""
    replies_per_prompt: Annotated[int, Field(ge=2)] = 4
    """K of InstructGPT: replies ranked per prompt."""


class PreferencesConfig(Section):
    path: Path | None = None
    """Preference file of people. Null: the labeller ranks replies of the start policy."""
    format: Annotated[str, one_of(RANKING_FORMATS, "auto")] = "auto"
    """Record format: ranking, pairwise, hh-rlhf; auto decides by the first record's fields."""
    limit: Positive | None = None
    """Read at most this many records."""
    held_out: NonNegative | None = None
    """Records kept for measuring accuracy, the last of the file. Null: a tenth, chosen by a hash of the prompt."""


class TrainingConfig(Section):
    """The keys of everything that learns."""

    ranks: Positive = 1
    """Data-parallel ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    learning_rate: PositiveNumber
    """Peak learning rate."""
    max_grad_norm: PositiveNumber = 1.0
    """Gradient clipping."""
    micro_batch_tokens: Positive = 2048
    """Largest padded micro-batch, in tokens."""
    gpus_per_rank: NonNegativeNumber = 0.0
    """GPUs of one rank."""


class LearnerConfig(TrainingConfig):
    learning_rate: PositiveNumber = 5e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule over all optimizer steps of the run, after warm-up."""
    warmup_optimizer_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: NonNegativeNumber = 0.0
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    cpus_per_rank: PositiveNumber = 1.0
    """CPU threads of one rank."""


class RewardModelConfig(TrainingConfig):
    base: str | None = None
    """Model that the reward model starts from. Null: model.path."""
    layers: Positive | None = None
    """How many of the base's layers are kept, from the first on. Null: all. A shallow reward model costs less to train
    and to score with, and few layers are enough for what can be read off the words, such as tone."""
    epochs: Positive = 1
    """Passes over the preferences."""
    prompts_per_batch: Positive = 8
    """Prompts (with all their replies) per optimizer step."""
    learning_rate: PositiveNumber = 1e-5
    """Peak learning rate; linear warm-up over a tenth, then linear decay."""
    max_length: Positive = 512
    """Longer transcripts lose tokens at their start; counted."""
    cpus_per_rank: Positive | None = None
    """CPU threads of one rank. Null: all cores of a node, shared by its ranks."""
    checkpoint_every_steps: NonNegative = 25
    """Optimizer steps between two checkpoints of the training, from which it continues after a failure. A checkpoint
    takes up to 16 bytes per parameter; only the newest is kept, until the training ends. 0: none."""

    def learner(self, optimizer_steps: int) -> LearnerConfig:
        """How a training of so many steps learns: a tenth of them is warm-up, then the rate falls linearly."""
        shared = {key: getattr(self, key) for key in TrainingConfig.model_fields}
        return LearnerConfig(**shared, schedule="linear", warmup_optimizer_steps=optimizer_steps // 10)


class CriticConfig(LearnerConfig):
    path: str | None = None
    """Model that the critic starts from, with the policy's vocabulary; the same as model.path: the policy with a new
    head. Null: the reward model, else the policy with a new head."""
    warmup_steps: NonNegative = 0
    """First steps in which only the critic learns."""


class ReferenceConfig(Section):
    path: str | None = None
    """Reference model. Null: model.path."""
    ranks: Positive = 1
    """Ranks that hold it."""
    sharded: bool = False
    """One model sharded over the ranks (ZeRO-3) instead of a copy each."""
    micro_batch_tokens: Positive = 4096
    """Largest padded forward batch, in tokens."""
    cpus_per_rank: PositiveNumber = 1.0
    """CPU threads of one rank."""
    gpus_per_rank: NonNegativeNumber = 0.0
    """GPUs of one rank."""


class RolloutConfig(Section):
    engine: Literal["auto", "vllm", "hf"] = "auto"
    """vllm, or hf (generate of transformers) for architectures that vLLM does not serve. auto: vllm where it is
    installed and, tried on a small random model, serves the architecture of model.path rightly; else hf."""
    replicas: Positive = 1
    """Number of engines."""
    tensor_parallel_size: Positive = 1
    """GPUs that one engine is split over."""
    temperature: PositiveNumber = 1.0
    """Sampling temperature; the learner's log-probs use it too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1 the samples are not from the policy that learns."""
    top_k: int = -1
    """Top-k sampling; -1: off. Otherwise as for top_p."""
    max_new_tokens: Positive = 64
    """Longest response."""
    samples_per_shard: Positive = 64
    """Requests that one engine gets together. Part of what makes samples reproducible."""
    reproducible: bool = True
    """Shards of a fixed size: the same seeds give the same bits on any number of engines. Off: throughput first, a
    step's samples are split over the engines at once."""
    kv_cache_gib: PositiveNumber = 1.0
    """KV cache of one engine on the CPU."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of a GPU's memory that one engine takes."""
    cpus_per_replica: PositiveNumber = 2.0
    """CPU threads of one engine."""
    gpus_per_replica: NonNegativeNumber = 0.0
    """GPUs of one engine."""

    def contradictions(self, model: ModelConfig) -> Iterator[str]:
        if self.max_new_tokens >= model.max_length:
            yield (
                f"rollout.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"model.max_length={model.max_length}. Lower the first or raise the second."
            )

    @property
    def engine_kind(self) -> Literal["vllm", "hf"]:
        """The resolved `engine`. Raises ConfigError while it is auto."""
        if self.engine == "auto":
            raise ConfigError("rollout.engine is still auto here; give vllm or hf (jobs.resolve chooses one).")
        return self.engine


class PublishConfig(Section):
    bucket_mib: Positive = 32
    """Weights travel in flat buckets of this size."""
    verify: Literal["full", "sampled", "checksums"] = "full"
    """Proof after publishing: read back all weights that layers compute with, a random part, or checksums only."""


class RlConfig(Section):
    steps: Positive = 20
    """Iterations: sample, score, learn, publish."""
    prompts_per_step: Positive = 32
    """Prompts sampled in one step."""
    samples_per_prompt: Positive = 2
    """Responses per prompt."""
    max_staleness: NonNegative = 0
    """Versions that sampling may run ahead of learning; 0: on-policy."""

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt


class PlacementConfig(Section):
    mode: Literal["colocated", "separate"] = "colocated"
    """colocated: roles share cores or GPUs and take turns; separate: each role has its own."""
    wait_s: Seconds = 20.0
    """How long to wait for the cluster to answer and to have the nodes that the plan needs."""

    def contradictions(self, rl: RlConfig) -> Iterator[str]:
        if rl.max_staleness and self.mode == "colocated":
            yield (
                f"placement.mode='colocated' needs rl.max_staleness=0, got {rl.max_staleness}: roles that share a "
                "device cannot sample while they learn. Set rl.max_staleness=0 or placement.mode='separate'."
            )


class CheckpointConfig(Section):
    every_steps: NonNegative = 0
    """Save after every so many steps; 0: only at the end."""
    keep: Positive = 2
    """Newest checkpoints kept; the best by evaluation is kept besides."""
    best_metric: Literal["evaluation/gold_mean", "evaluation/reward_mean"] | None = "evaluation/gold_mean"
    """Metric of evaluation by which a checkpoint is the best, higher is better. Those checkpoints compete whose step
    is on the schedules of saving and of evaluation; checkpoints/best.json names the best. Null: none is kept."""
    best_max_kl: PositiveNumber | None = None
    """Highest KL per held-out response (evaluation/kl_per_response, nats) of the best checkpoint. Null: no bound."""
    export: bool = True
    """Write the final policy as a plain Hugging Face folder, export/; where an earlier checkpoint is the best, its
    policy too, export-best/."""

    @model_validator(mode="after")
    def _keys_fit_together(self) -> CheckpointConfig:
        if self.best_max_kl is not None and self.best_metric is None:
            raise ValueError("checkpoints.best_max_kl needs checkpoints.best_metric: set it, or leave both out.")
        return self


class EvaluationConfig(Section):
    every_steps: NonNegative = 0
    """Evaluate on held-out prompts after every so many steps; 0: before the first and after the last."""
    prompts: NonNegative = 128
    """Held-out prompts; 0: no evaluation."""
    gold: str | None = "actors.rewards.gold:vader_positivity"
    """Rule function that scores held-out responses. Null: the training reward. A response that it fails on is left out
    before and after; where it fails on all, the run ends."""


class TelemetryConfig(Section):
    prometheus_port: NonNegative | None = 0
    """Port of the coordinator's Prometheus endpoint; 0: a free one; null: none."""
    prometheus_host: str = "127.0.0.1"
    """Address that the endpoint listens on; in a pod, 0.0.0.0."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project. Null: off. Needs the package wandb."""
    mlflow_uri: str | None = None
    """MLflow tracking URI. Null: off. Needs the package mlflow."""


class FailuresConfig(Section):
    infrastructure: NonNegative = 10
    """Failures answered by a restart, within any window_steps steps: a process or node died, or was silent too long."""
    programming: NonNegative = 1
    """The same for errors of an actor that nobody expected."""
    data: NonNegative = 0
    """The same for bad data, failed rewards and non-finite numbers, which would come again."""
    window_steps: Positive = 20
    """Steps after which a failure no longer counts against its budget."""


class DeadlinesConfig(Section):
    start_s: Seconds = 300.0
    """An actor's start, model included."""
    generate_s: Seconds = 600.0
    """Sampling one shard."""
    score_s: Seconds = 600.0
    """Scoring one shard by one role."""
    record_s: Seconds = 300.0
    """Writing one shard of experience."""
    learn_s: Seconds = 3600.0
    """One learning step of one role."""
    publish_s: Seconds = 300.0
    """Publishing one version."""
    save_s: Seconds = 600.0
    """Saving or loading one role's checkpoint, exporting."""
