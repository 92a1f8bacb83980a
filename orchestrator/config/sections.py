"""Configuration sections that stages share, with their defaults."""

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
    changed_key,
    one_of,
)
from orchestrator.config.rewards import PairJudgeConfig
from orchestrator.data.formats.prompts import PROMPT_FORMATS
from orchestrator.errors import ConfigError

_CPU_SHARD, _GPU_SHARD = 64, 512


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")
    """Name of the run."""
    id: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9-]{0,60}$")
    """Run id. If a run with this id exists, it is continued; else it is started. Null: run.name and the start time."""
    root: Path = Path("runs")
    """Folder that contains run folders. On a cluster it must be storage that all nodes share."""
    mirror: str | None = None
    """Other storage for a copy of the run, such as s3://bucket/prefix or an absolute path. With `run.id` set, a lost
    run folder is restored from it."""
    mirror_every_s: Seconds = 60.0
    """Time between copies. Changes after the last copy are lost with the folder."""
    cache: Path = Path("~/.cache/rlhf-orchestrator")
    """Folder for converted models; safe to delete."""
    grace_s: Seconds = 30.0
    """Time to save the state when a run is stopped. Must be shorter than the grace period of Kubernetes or Ray."""
    seed: int = 1
    """Seed of the run; all randomness derives from it."""
    contents: Mapping[str, str] = {}
    """Digests of the run's input files: prompts, preferences, models, chat template, rules. Written when a run starts;
    values given here are ignored."""
    accept_changed_files: bool = False
    """Continue a run even if its input files changed since the last attempt."""


class ModelConfig(Section):
    path: str = "smollm2-135m-instruct"
    """Initial policy: a folder, a Hugging Face name, or the embedded smollm2-135m-instruct."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of all models and engines. Learners keep fp32 master weights. auto: bfloat16 on GPUs; on CPUs the
    faster type, measured when a run starts and then fixed."""
    max_length: Positive = 512
    """Context length: maximum number of prompt and response tokens."""
    chat_template: Path | None = None
    """File with a Jinja chat template that replaces the policy's. Exported with the policy."""
    today: date | None = None
    """Date for chat templates that print the current date. Null: the day on which the run starts."""
    system_prompt: str | None = None
    """System message for conversations without one. Applies to the policy, and to a reward model whose folder does not
    record its own. Null: the chat template's default."""
    trust_remote_code: bool = False
    """Run Python code from model folders."""

    @property
    def compute_dtype(self) -> Dtype:
        """The resolved `dtype`. Raises ConfigError while it is auto."""
        if self.dtype == "auto":
            raise ConfigError("model.dtype is still auto here; set bfloat16 or float32 (jobs.resolve selects one).")
        return self.dtype


class PromptsConfig(Section):
    path: Path = Path("jobs/data/quickstart_prompts.jsonl")
    """Prompt file: JSONL, JSON or Parquet, plain or gzip/zstd."""
    format: Annotated[str, one_of(PROMPT_FORMATS, "auto")] = "auto"
    """Record format (docs/data.md). auto: detected from the first record's fields."""
    limit: Positive | None = None
    """Read at most this many records."""
    max_prompt_tokens: Positive = 256
    """Longer prompts are skipped, counted and listed."""
    held_out_fraction: Fraction = 0.2
    """Share of prompts reserved for evaluation, selected by a hash of the prompt."""
    reward_model_fraction: Fraction = 0.4
    """Share of prompts used to train the reward model, selected by the same hash."""


class SampleConfig(Section):
    prompts: Positive = 256
    """Number of prompts to sample replies for."""
    samples_per_prompt: Positive = 4
    """Replies per prompt (K of InstructGPT)."""
    split: Literal["reward_model", "train", "held_out"] = "reward_model"
    """The prompts to use: those reserved for the reward model, for training or for evaluation."""


class LabellerConfig(Section):
    gold: str = "actors.rewards.gold:vader_positivity"
    """Rule function (dotted name) that simulates a human labeller. Models never see its score."""
    noise_std: NonNegativeNumber = 0.1
    """Standard deviation of the noise added to scores before ranking."""


class ScoreConfig(Section):
    path: Path | None = None
    """Prompts with replies that were written elsewhere: a file as of prompts, each row with a field completion,
    response or reply. Null: the samples of an earlier stage."""
    format: Annotated[str, one_of(PROMPT_FORMATS, "auto")] = "auto"
    """Record format (docs/data.md). auto: detected from the first record's fields."""


class SelectConfig(Section):
    keep: Literal["best", "top", "pairs", "rankings"] = "best"
    """Selection from scored samples. best: the best reply to each prompt, to be learned; top: the best select.share of
    all replies, to be learned; pairs: the best and the worst reply to each prompt, as preferences; rankings: all
    distinct replies to a prompt in order, as preferences."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of replies that select.keep=top keeps."""
    min_margin: NonNegativeNumber = 0.0
    """Pairs whose scores differ by less are skipped and counted."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu 2021): the model's own weights are frozen, and only adapters of its linear layers
    learn."""

    rank: NonNegative = 0
    """Rank of the adapters, such as 16; they need about ten times the learning rate of full training. 0: all weights
    learn."""
    alpha: PositiveNumber = 32.0
    """Scale: what an adapter adds is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Linear layers that get adapters, by the last part of their names, such as [q_proj, v_proj]. Empty: all of the
    decoder; never the output head."""
    dora: bool = False
    """Learn the length of every row of the weights, too (DoRA, Liu 2024). Slower."""
    rank_stabilised: bool = False
    """Divide alpha by the square root of the rank instead of the rank (rsLoRA, Kalajdzievski 2023)."""
    trunk_bits: Literal[4, 8] | None = None
    """Keep the frozen weights of all linear layers in 4 or 8 bits (QLoRA, Dettmers 2023). Needs the package
    bitsandbytes. Null: model.dtype."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def describe(self) -> str:
        if not self.rank:
            return "off"
        kind = "DoRA" if self.dora else "LoRA"
        trunk = f" of a trunk in {self.trunk_bits} bits" if self.trunk_bits else ""
        return f"{kind} of rank {self.rank}, scale {self.scale:g}, on {', '.join(self.targets) or 'all layers'}{trunk}"


class TrainingConfig(Section):
    """The keys of all training."""

    ranks: Positive = 1
    """Data-parallel ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    learning_rate: PositiveNumber
    """Peak learning rate."""
    max_grad_norm: PositiveNumber = 1.0
    """Gradient norm above which gradients are clipped."""
    micro_batch_tokens: Positive = 2048
    """Largest padded micro-batch, in tokens."""
    gpus_per_rank: NonNegativeNumber = 0.0
    """GPUs of one rank."""
    offload_optimizer: bool = False
    """Keep master weights, moments and accumulated gradients in the host's memory, and update there: 16 bytes less per
    parameter and GPU, divided by the ranks; slower. Needs GPUs, and zero_stage 1 to 3."""
    zero_hpz_partition_size: Positive = 1
    """With zero_stage=3, ranks of one node that together keep a second copy of the weights, from which the backward
    pass gathers without the network between nodes (ZeRO++, Wang 2023): the ranks per node, or 1 for no copy. Takes 2
    bytes per parameter, divided by this number."""
    liger: bool = False
    """Norms and MLPs by Liger's kernels (Hsu 2024), of package liger-kernel; only on GPUs and for architectures that
    it supports. Changes the last bits."""
    lora: LoraConfig = LoraConfig()

    def contradictions(self, name: str) -> Iterator[str]:
        """Of the section called `name`."""
        yield from self._device_contradictions(name)
        bits = self.lora.trunk_bits
        idle = changed_key(self.lora, *type(self.lora).model_fields)
        if idle is not None and not self.lora.rank:
            yield (
                f"{name}.lora.{idle}={getattr(self.lora, idle)} needs adapters, and {name}.lora.rank is 0: all weights "
                f"would learn. Set {name}.lora.rank, such as 16, or leave {idle} out."
            )
        if bits is not None and self.zero_stage == 3:
            yield (
                f"{name}.lora.trunk_bits={bits} needs {name}.zero_stage of 0 to 2: ZeRO-3 can't shard quantised "
                "weights."
            )

    def _device_contradictions(self, name: str) -> Iterator[str]:
        for key in ("offload_optimizer", "liger"):
            if getattr(self, key) and not self.gpus_per_rank:
                yield (
                    f"{name}.{key}=true needs GPUs, and {name}.gpus_per_rank is 0. Set {name}.{key}=false, or give "
                    f"{name}.gpus_per_rank."
                )
        if self.offload_optimizer and not self.zero_stage:
            yield (
                f"{name}.offload_optimizer=true with {name}.zero_stage=0: stage 0 keeps all states on the GPU. Set "
                f"{name}.zero_stage=1 or higher."
            )
        size = self.zero_hpz_partition_size
        if size > 1 and self.zero_stage < 3:
            yield (
                f"{name}.zero_hpz_partition_size={size} with {name}.zero_stage={self.zero_stage}: only stage 3 gathers "
                f"weights. Set {name}.zero_stage=3, or {name}.zero_hpz_partition_size=1."
            )
        if self.ranks % size:
            yield (
                f"{name}.zero_hpz_partition_size={size} does not divide {name}.ranks={self.ranks}. Set it to the ranks "
                "of one node."
            )


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
    """Recompute activations in the backward pass: saves memory, takes a third more time."""
    cpus_per_rank: PositiveNumber = 1.0
    """CPU threads of one rank."""


class PolicyConfig(LearnerConfig):
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share that an exponential moving average of the weights keeps per step, such as 0.99. With an average, the run
    exports it as its policy, and samples from the weights that learn. 0: none."""


class CriticConfig(LearnerConfig):
    path: str | None = None
    """Initial model of the critic; must have the policy's vocabulary. Equal to model.path: the policy with a new head.
    Null: the reward model if there is one, else the policy with a new head. If it is the policy with a new
    head, and both have adapters (lora.rank) and no ZeRO-3, it is no model of its own: its adapters are on the policy's
    trunk, in the policy's processes, and keys about ranks and their resources have no effect."""
    warmup_steps: NonNegative = 0
    """Number of initial steps in which only the critic learns."""


class ReferenceConfig(Section):
    path: str | None = None
    """Reference model. Null: model.path. If policy.lora.rank is set and this is null or model.path, no reference model
    is loaded: the policy computes without its adapters, and the other keys have no effect."""
    ranks: Positive = 1
    """Data-parallel ranks."""
    sharded: bool = False
    """Shard one model over the ranks (ZeRO-3) instead of one copy per rank."""
    micro_batch_tokens: Positive = 4096
    """Largest padded forward batch, in tokens."""
    cpus_per_rank: PositiveNumber = 1.0
    """CPU threads of one rank."""
    gpus_per_rank: NonNegativeNumber = 0.0
    """GPUs of one rank."""


class RolloutConfig(Section):
    engine: Literal["auto", "vllm", "hf"] = "auto"
    """vllm, or hf (generate of transformers) for architectures that vLLM does not support. auto: vllm if it is
    installed and passes a trial on a small random model of model.path's architecture; else hf."""
    replicas: Positive = 1
    """Number of engines."""
    tensor_parallel_size: Positive = 1
    """Number of GPUs per engine (tensor parallelism); on CPUs, of processes. Needs vLLM."""
    temperature: PositiveNumber = 1.0
    """Sampling temperature; the learner's log-probs use it too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1, samples do not follow the learning policy's distribution."""
    top_k: int = -1
    """Top-k sampling. -1: off; other values have the same effect as top_p below 1."""
    max_new_tokens: Positive = 64
    """Maximum response length, in tokens."""
    samples_per_shard: Positive | None = None
    """Requests sent to one engine together, which it samples at the same time as far as its KV cache has room. Changing
    it changes the samples. Null: 64 on CPUs, 512 on GPUs."""
    reproducible: bool = True
    """Shards have a fixed size: the same seeds give the same bits on any number of engines. false: split a step's
    samples evenly over the engines for throughput."""
    prefix_caching: bool = False
    """The samples of a prompt in a shard share the KV cache of its full blocks (128 tokens on CPUs, 16 on GPUs). Needs
    vLLM. On CPUs the samples were the same bits as without it; not yet run on a GPU."""
    kv_cache_gib: PositiveNumber = 1.0
    """KV cache of one engine on a CPU."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of a GPU's memory used by one engine."""
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
        if self.engine == "hf" and self.prefix_caching:
            yield "rollout.prefix_caching=true needs rollout.engine=vllm. Set it to false."
        if self.engine == "hf" and self.tensor_parallel_size > 1:
            yield (
                f"rollout.tensor_parallel_size={self.tensor_parallel_size} needs rollout.engine=vllm: engines of "
                "transformers compute on one device. Set it to 1 and raise rollout.replicas."
            )

    @property
    def on_gpus(self) -> bool:
        """Whether engines compute on GPUs."""
        return self.gpus_per_replica > 0

    @property
    def shard_size(self) -> int:
        """The resolved `samples_per_shard`."""
        return self.samples_per_shard or (_GPU_SHARD if self.gpus_per_replica else _CPU_SHARD)

    @property
    def engine_kind(self) -> Literal["vllm", "hf"]:
        """The resolved `engine`. Raises ConfigError while it is auto."""
        if self.engine == "auto":
            raise ConfigError("rollout.engine is still auto here; set vllm or hf (jobs.resolve selects one).")
        return self.engine


class RlConfig(Section):
    steps: Positive = 20
    """Iterations: sample, score, learn, publish."""
    prompts_per_step: Positive = 32
    """Prompts sampled in one step."""
    samples_per_prompt: Positive = 2
    """Responses per prompt."""
    max_staleness: NonNegative = 0
    """Maximum number of versions that sampling may run ahead of learning. 0: on-policy."""

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt


class PlacementConfig(Section):
    mode: Literal["colocated", "separate", "mixed"] = "colocated"
    """colocated: roles share cores or GPUs and take turns. separate: each role has its own. mixed: engines have their
    own, all other roles share theirs and take turns."""
    wait_s: Seconds = 20.0
    """Time limit for the cluster to answer and to have the nodes that the placement needs."""
    gpu_memory_gib: PositiveNumber | None = None
    """Memory of each GPU, for checks. Null: that of the kind that Ray reports, or of this machine's GPUs."""

    def contradictions(self, rl: RlConfig) -> Iterator[str]:
        if rl.max_staleness and self.mode == "colocated":
            yield (
                f"placement.mode='colocated' needs rl.max_staleness=0, got {rl.max_staleness}: roles that share a "
                "device cannot sample while they learn. Set rl.max_staleness=0 or placement.mode='separate'."
            )


class CheckpointConfig(Section):
    every_steps: NonNegative = 0
    """Steps between checkpoints. 0: save only at the end."""
    keep: Positive = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    best_metric: Literal["evaluation/gold_mean", "evaluation/reward_mean"] | None = "evaluation/gold_mean"
    """Evaluation metric that selects the best checkpoint (higher is better) among the steps that the schedules of
    saving and evaluation share. checkpoints/best.json names it. Null: none is selected."""
    best_max_kl: PositiveNumber | None = None
    """Highest KL per held-out response (evaluation/kl_per_response, nats) of the best checkpoint. Null: no bound."""
    export: bool = True
    """Write the final policy to export/ as a Hugging Face folder. If an earlier checkpoint is the best, also write its
    policy to export-best/."""

    @model_validator(mode="after")
    def _keys_fit_together(self) -> CheckpointConfig:
        if self.best_max_kl is not None and self.best_metric is None:
            raise ValueError("checkpoints.best_max_kl needs checkpoints.best_metric: set it, or remove both.")
        return self


class EvaluationConfig(Section):
    every_steps: NonNegative = 0
    """Steps between evaluations on held-out prompts. 0: only before the first and after the last step."""
    prompts: NonNegative = 128
    """Number of held-out prompts. 0: no evaluation."""
    gold: str | None = "actors.rewards.gold:vader_positivity"
    """Rule function that scores held-out responses. Null: the training reward. Prompts on which it fails are excluded
    from both sides of a comparison; if it fails on all of them, the run ends."""


class EvaluateConfig(Section):
    """The keys of stage evaluate. Prompts and gold rule are those of `evaluation`."""

    against: str | None = None
    """Model to compare the policy with: a folder, a Hugging Face name. Null: the run's initial policy, model.path."""
    judge: PairJudgeConfig | None = None
    """A judge that compares the replies of both models to each prompt, in both orders. Null: none."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval on which both models are measured: names, or YAML files. Needs the package lm-eval."""
    require: Mapping[str, Annotated[str, Field(pattern=r"^\s*(<=|>=|<|>)\s*-?\d+(\.\d+)?\s*$")]] = Field(
        default_factory=dict
    )
    """Bounds of metrics, such as {gold_win_rate: "> 0.5"}. If one is not met, the run ends with exit code 3."""


class TelemetryConfig(Section):
    prometheus_port: NonNegative | None = 0
    """Port of the coordinator's Prometheus endpoint. 0: any free port; null: no endpoint."""
    prometheus_host: str = "127.0.0.1"
    """Address that the endpoint listens on; in a pod, 0.0.0.0."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project. Null: off. Needs the package wandb."""
    mlflow_uri: str | None = None
    """MLflow tracking URI. Null: off. Needs the package mlflow."""


class FailuresConfig(Section):
    infrastructure: NonNegative = 10
    """Maximum restarts within window_steps steps after a process or node died or missed a deadline."""
    programming: NonNegative = 1
    """The same for unexpected errors of an actor."""
    data: NonNegative = 0
    """The same for bad data, failed rewards and non-finite numbers, which would recur."""
    window_steps: Positive = 20
    """Number of steps for which a failure counts against its budget."""


class DeadlinesConfig(Section):
    start_s: Seconds = 300.0
    """Start of an actor. A minute is added for each GiB of the run's largest model."""
    generate_s: Seconds = 600.0
    """Sampling one shard."""
    score_s: Seconds = 600.0
    """Scoring one shard in one role."""
    record_s: Seconds = 300.0
    """Writing one shard of experience."""
    learn_s: Seconds = 3600.0
    """One learning step of one role."""
    publish_s: Seconds = 300.0
    """Publishing one version."""
    save_s: Seconds = 600.0
    """Saving or loading one role's checkpoint, or exporting it."""
