"""The configuration: one frozen tree, defaults in one place, every field documented, unknown keys refused.

A YAML file and dotted overrides (`ppo.steps=10 model.path=/models/llama`) become a `Config`, or a ConfigError that
names the key and the way out. `docs/configuration.md` is generated from the descriptions below.
"""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import ConfigError
from orchestrator.inputs import read_text
from orchestrator.outside_text import has_credential
from orchestrator.yaml_text import MAX_YAML_BYTES, parse_yaml

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["bfloat16", "float32"]
Seconds = Annotated[float, Field(gt=0.0)]

_SHOWN_ERRORS = 20
_DEEPEST_KEY = 20  # sections before a key of an override; real keys have up to three
_CREDENTIAL_PLACES = {
    "run.mirror": "pyarrow reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "telemetry.mlflow_uri": "MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN",
    "reward.http.url": "name its environment variable or file in reward.http.token_from",
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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
    format: Literal["auto", "prompt", "messages", "hh-rlhf", "alpaca", "question"] = "auto"
    """Record format; auto decides by the first record's fields."""
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
    noise_std: Annotated[float, Field(ge=0.0)] = 0.1
    """Standard deviation of the noise added to a score before replies are ranked."""
    prompts: Positive = 256
    """Prompts to sample replies for."""
    replies_per_prompt: Annotated[int, Field(ge=2)] = 4
    """K of InstructGPT: replies ranked per prompt."""


class PreferencesConfig(Section):
    path: Path | None = None
    """Preference file of people. Null: the labeller ranks replies of the start policy."""
    format: Literal["auto", "ranking", "pairwise", "hh-rlhf"] = "auto"
    """Record format; auto decides by the first record's fields."""
    limit: Positive | None = None
    """Read at most this many records."""
    held_out: NonNegative | None = None
    """Records kept for measuring accuracy, the last of the file. Null: a tenth, chosen by a hash of the prompt."""


class RewardModelConfig(Section):
    base: str | None = None
    """Model that the reward model starts from. Null: model.path."""
    layers: Positive | None = None
    """How many of the base's layers are kept, from the first on. Null: all. A shallow reward model costs less to train
    and to score with, and few layers are enough for what can be read off the words, such as tone."""
    epochs: Positive = 1
    """Passes over the preferences."""
    prompts_per_batch: Positive = 8
    """Prompts (with all their replies) per optimizer step."""
    micro_batch_tokens: Positive = 2048
    """Largest padded micro-batch, in tokens."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate; linear warm-up over a tenth, then linear decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    max_length: Positive = 512
    """Longer transcripts lose tokens at their start; counted."""
    workers: Positive = 1
    """Ray Train workers."""
    threads_per_worker: Positive | None = None
    """CPU threads of one worker. Null: all cores of a node, shared by its workers."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one worker."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""


class RuleConfig(Section):
    function: str
    """Dotted name `package.module:function` of (prompt, response, meta) -> float or mapping of parts."""
    weight: float = 1.0
    """Factor of this rule in the sum."""


class RuleLimits(Section):
    """Of the process in which rules run, the labeller's and evaluation's gold rules too."""

    call_s: Seconds = 30.0
    """Time for one call of a rule. It is ended then, and its sample fails."""
    import_s: Seconds = 60.0
    """Time to import the rules' modules."""
    memory_gib: Annotated[float, Field(gt=0)] | None = 4.0
    """Memory of the process and all that it starts. Null: no limit."""
    processes: Positive = 64
    """Processes that it may have at one time. Whatever it has started ends with it; where this program may make a PID
    namespace (as root with CAP_SYS_ADMIN) also what forks faster than it could be killed."""


class HttpRewardConfig(Section):
    url: str
    """Endpoint: POST {"samples": [{"prompt","response","meta"}]} answers {"rewards": [number or null]}."""
    timeout_s: Seconds = 30.0
    """Time for one request, from connecting to the last byte of the answer."""
    retries: NonNegative = 3
    """Further tries after a failure, with growing pauses."""
    token_from: str | None = Field(None, pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+)$")
    """Where the reward workers find a token that is sent as `Authorization: Bearer`: env:NAME or file:/PATH. The token
    itself never stands in the config. Null: none is sent."""


class RewardConfig(Section):
    kind: Literal["model", "rules", "http"] = "model"
    """Where rewards come from."""
    path: str | None = None
    """Reward model folder or name (kind: model). Null: the one that the reward_model stage trained."""
    rules: tuple[RuleConfig, ...] = ()
    """Rule functions (kind: rules); their weighted sum is the reward."""
    limits: RuleLimits = RuleLimits()
    http: HttpRewardConfig | None = None
    """Endpoint (kind: http)."""
    replicas: Positive = 1
    """Actors that score."""
    micro_batch_tokens: Positive = 4096
    """Largest padded forward batch, in tokens."""
    max_length: Positive | None = None
    """Longer transcripts lose tokens at their start (kind: model), counted in reward/cut. Null: reward_model.max_length
    for the model that the reward_model stage trains, else what the model can take."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation recorded with the reward model."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Clip the sequence reward to ±clip."""
    max_failed_fraction: Fraction = 0.1
    """Share of samples of one step whose reward may fail; they are dropped and counted."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """CPU threads of one replica."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one replica."""


class LearnerConfig(Section):
    ranks: Positive = 1
    """Data-parallel ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule over all optimizer steps of the run, after warm-up."""
    warmup_optimizer_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    micro_batch_tokens: Positive = 2048
    """Largest padded micro-batch, in tokens."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    cpus_per_rank: Annotated[float, Field(gt=0)] = 1.0
    """CPU threads of one rank."""
    gpus_per_rank: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one rank."""


class CriticConfig(LearnerConfig):
    path: str | None = None
    """Model that the critic starts from, with the policy's vocabulary; the same as model.path: the policy with a new
    head. Null: the reward model, else the policy with a new head."""
    warmup_steps: NonNegative = 0
    """First steps in which only the critic learns."""


class ReferenceConfig(Section):
    path: str | None = None
    """Reference model. Null: model.path."""
    replicas: Positive = 1
    """Ranks that hold it."""
    sharded: bool = False
    """One model sharded over the ranks (ZeRO-3) instead of a replica each."""
    micro_batch_tokens: Positive = 4096
    """Largest padded forward batch, in tokens."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """CPU threads of one replica."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one replica."""


class RolloutConfig(Section):
    engine: Literal["auto", "vllm", "hf"] = "auto"
    """vllm, or hf (generate of transformers) for architectures that vLLM does not serve. auto: vllm where it is
    installed and, tried on a small random model, serves the architecture of model.path rightly; else hf."""
    engines: Positive = 1
    """Number of engines."""
    tensor_parallel_size: Positive = 1
    """GPUs that one engine is split over."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
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
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """KV cache of one engine on the CPU."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of a GPU's memory that one engine takes."""
    cpus_per_engine: Annotated[float, Field(gt=0)] = 2.0
    """CPU threads of one engine."""
    gpus_per_engine: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one engine."""

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


class PpoConfig(Section):
    steps: Positive = 20
    """PPO iterations."""
    prompts_per_step: Positive = 32
    """Prompts sampled in one step."""
    samples_per_prompt: Positive = 2
    """Responses per prompt."""
    minibatches: Positive = 1
    """Optimizer steps per epoch."""
    epochs: Positive = 1
    """Passes over a step's experience."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Policy clip range (Schulman 2017)."""
    clip_value: Annotated[float, Field(gt=0)] | None = 0.2
    """Value clip range. Null: off."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    advantage: Literal["gae", "grpo", "rloo"] = "gae"
    """gae: generalised advantage estimation with the critic. grpo, rloo: no critic; a response's return is compared
    with its prompt's other responses, over their standard deviation (grpo) or not (rloo)."""
    gamma: Fraction = 1.0
    """Discount (advantage: gae)."""
    lam: Fraction = 0.95
    """GAE lambda."""
    whiten_advantages: bool = True
    """Whiten advantages over the whole batch (advantage: gae)."""
    kl_estimator: Literal["k1-reward", "k3-loss"] = "k1-reward"
    """KL to the reference per token: k1 in the reward, or k3 in the loss."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL penalty; start value of the adaptive controller."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """KL per response that the adaptive controller aims at. Null: fixed coefficient."""
    kl_horizon_samples: Positive = 10_000
    """Horizon of the adaptive controller (Ziegler 2019)."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """Stop a step's epochs when the approximate KL to its start exceeds this. Null: never."""
    truncated: Literal["bootstrap", "penalise"] = "bootstrap"
    """A response cut by length: bootstrap with the critic (without one its reward stands as it is), or subtract
    truncation_penalty."""
    truncation_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Reward subtracted from a response that was cut by length (truncated: penalise)."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """Cap of the truncated importance weight between learner and engine. Null: off; needed at max_staleness > 0."""
    max_staleness: NonNegative = 0
    """Versions that sampling may run ahead of learning; 0: on-policy."""

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"


class PlacementConfig(Section):
    mode: Literal["colocated", "separate"] = "colocated"
    """colocated: roles share cores or GPUs and take turns; separate: each role has its own."""
    wait_s: Seconds = 20.0
    """How long to wait for the cluster to answer and to have the nodes that the plan needs."""


class CheckpointConfig(Section):
    every_steps: NonNegative = 0
    """Save after every so many steps; 0: only at the end."""
    keep: Positive = 2
    """Newest checkpoints kept; the best by evaluation is kept besides."""
    best_metric: Literal["evaluation/gold_mean", "evaluation/reward_mean"] | None = "evaluation/gold_mean"
    """Metric of evaluation by which a checkpoint is the best, higher is better. Those checkpoints compete whose step
    is on the schedules of saving and of evaluation; checkpoints/best.json names the best. Null: none is kept."""
    best_max_kl: Annotated[float, Field(gt=0)] | None = None
    """Highest KL per held-out response (evaluation/kl_per_response, nats) of the best checkpoint. Null: no bound."""
    export: bool = True
    """Write the final policy as a plain Hugging Face folder, export/; where an earlier checkpoint is the best, its
    policy too, export-best/."""


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


GuardAction = Literal["warn", "pause", "stop"]


class GuardConfig(Section):
    action: GuardAction = "stop"
    """warn: an event and a line; pause: wait until the file PAUSED in the run folder is deleted; stop: exit code 3."""


class KlGuardConfig(GuardConfig):
    max: Annotated[float, Field(gt=0)] | None = None
    """Highest KL per response (kl/per_response, nats). Null: off."""


class EntropyGuardConfig(GuardConfig):
    min: Annotated[float, Field(gt=0)] | None = None
    """Lowest entropy of the policy (policy/entropy, nats), in steps in which it learns. Null: off."""


class LengthGuardConfig(GuardConfig):
    min: Annotated[float, Field(gt=0)] | None = None
    """Lowest mean response length (response/length_mean, tokens). Null: off."""
    max: Annotated[float, Field(gt=0)] | None = None
    """Highest mean response length; below rollout.max_new_tokens. Null: off."""


class RewardJumpGuardConfig(GuardConfig):
    max: Annotated[float, Field(gt=0)] | None = None
    """Largest distance of reward/mean from its median over the last `window` steps, in their standard deviations. Null:
    off."""
    window: Annotated[int, Field(ge=3)] = 10
    """Steps to compare with; a step with fewer before it passes."""


class MismatchGuardConfig(GuardConfig):
    max: Annotated[float, Field(gt=0)] | None = None
    """Highest mean |log-prob of the learner - log-prob of the engine| (engine/mismatch, nats). Null: off."""


class FailedRewardsGuardConfig(Section):
    action: Literal["warn", "pause"] = "warn"
    """As above. Above reward.max_failed_fraction the run stops in any case, before the step is committed."""
    max: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Highest share of failed rewards (reward/failed_fraction); below reward.max_failed_fraction. Null: off."""


class GuardsConfig(Section):
    kl: KlGuardConfig = KlGuardConfig()
    entropy: EntropyGuardConfig = EntropyGuardConfig()
    length: LengthGuardConfig = LengthGuardConfig()
    reward_jump: RewardJumpGuardConfig = RewardJumpGuardConfig()
    mismatch: MismatchGuardConfig = MismatchGuardConfig()
    failed_rewards: FailedRewardsGuardConfig = FailedRewardsGuardConfig()


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


Stage = Literal["preferences", "reward_model", "ppo"]


class Config(Section):
    stages: tuple[Stage, ...] = ("ppo",)
    """Stages of the run, in order: preferences (sample and rank), reward_model, ppo."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    labeller: LabellerConfig = LabellerConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    reward: RewardConfig = RewardConfig()
    policy: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    rollout: RolloutConfig = RolloutConfig()
    publish: PublishConfig = PublishConfig()
    ppo: PpoConfig = PpoConfig()
    placement: PlacementConfig = PlacementConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    guards: GuardsConfig = GuardsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    failures: FailuresConfig = FailuresConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()

    @property
    def samples_per_step(self) -> int:
        return self.ppo.prompts_per_step * self.ppo.samples_per_prompt

    @property
    def has_rollouts(self) -> bool:
        """Whether any stage samples replies to the prompts, and so starts rollout engines."""
        return "preferences" in self.stages or "ppo" in self.stages

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Config:
        for complaint in _contradictions(self):
            raise ValueError(complaint)
        return self


def _contradictions(config: Config) -> Iterable[str]:
    yield from _sizes_that_contradict(config)
    ppo, reward = config.ppo, config.reward
    if ppo.max_staleness and config.placement.mode == "colocated":
        yield (
            f"placement.mode='colocated' needs ppo.max_staleness=0, got {ppo.max_staleness}: roles that share a "
            "device cannot sample while they learn. Set ppo.max_staleness=0 or placement.mode='separate'."
        )
    if ppo.max_staleness and ppo.importance_cap is None:
        yield (
            f"ppo.max_staleness={ppo.max_staleness} needs ppo.importance_cap: samples come from older weights and "
            "must be weighted. Set ppo.importance_cap=2.0 or ppo.max_staleness=0."
        )
    if reward.kind == "rules" and not reward.rules:
        yield "reward.kind='rules' needs reward.rules: list at least one {function: 'package.module:function'}."
    if reward.kind == "http" and reward.http is None:
        yield "reward.kind='http' needs reward.http.url: set the address of the endpoint."
    needs_model = "ppo" in config.stages and reward.kind == "model" and reward.path is None
    if needs_model and "reward_model" not in config.stages:
        yield (
            "reward.kind='model' needs reward.path: give the folder of a reward model, or add 'reward_model' to "
            "stages so that one is trained, or choose reward.kind='rules'."
        )
    trains_on_own_labels = "reward_model" in config.stages and config.preferences.path is None
    if trains_on_own_labels and "preferences" not in config.stages:
        yield (
            "stage 'reward_model' needs preferences.path: give a preference file, or let the labeller make one in a "
            "run with stages=[preferences,reward_model]."
        )
    order = [stage for stage in typing.get_args(Stage) if stage in config.stages]
    if list(config.stages) != order:
        yield f"stages must be distinct and in order; write stages: [{', '.join(order)}]."
    if config.checkpoints.best_max_kl is not None and config.checkpoints.best_metric is None:
        yield "checkpoints.best_max_kl needs checkpoints.best_metric: set it, or leave both out."
    yield from _guards_that_contradict(config)


def _sizes_that_contradict(config: Config) -> Iterable[str]:
    ppo, rollout = config.ppo, config.rollout
    samples = config.samples_per_step
    if samples % ppo.minibatches:
        lower = samples // ppo.minibatches * ppo.minibatches
        upper = lower + ppo.minibatches
        yield (
            f"ppo.prompts_per_step × ppo.samples_per_prompt = {samples} samples do not divide into "
            f"ppo.minibatches={ppo.minibatches}. The nearest sizes that do: {lower or upper} and {upper} samples."
        )
    if not ppo.has_critic:
        yield from _groups_that_contradict(config)
    if rollout.max_new_tokens >= config.model.max_length:
        yield (
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in "
            f"model.max_length={config.model.max_length}. Lower the first or raise the second."
        )


def _groups_that_contradict(config: Config) -> Iterable[str]:
    """Without a critic the samples of a prompt are compared with each other, so they must stay together."""
    ppo, size = config.ppo, config.ppo.samples_per_prompt
    if size < 2:
        yield (
            f"ppo.advantage='{ppo.advantage}' compares the samples of a prompt with each other and needs at least two, "
            f"got ppo.samples_per_prompt={size}. Set ppo.samples_per_prompt=4, or ppo.advantage='gae'."
        )
    shard = config.rollout.samples_per_shard
    if config.rollout.reproducible and shard % size:
        yield (
            f"rollout.samples_per_shard={shard} would part samples of one prompt, of which ppo.advantage="
            f"'{ppo.advantage}' needs all {size} together. Set it to {max(shard // size, 1) * size}."
        )
    if ppo.prompts_per_step % ppo.minibatches:
        yield (
            f"ppo.prompts_per_step={ppo.prompts_per_step} prompts do not divide into "
            f"ppo.minibatches={ppo.minibatches}, and with ppo.advantage='{ppo.advantage}' the samples of a prompt "
            "stay in one minibatch. Change either."
        )


def _guards_that_contradict(config: Config) -> Iterable[str]:
    length, jump, failed = config.guards.length, config.guards.reward_jump, config.guards.failed_rewards
    longest = config.rollout.max_new_tokens
    if length.min is not None and length.min > (length.max or longest):
        key = "guards.length.max" if length.max else "rollout.max_new_tokens"
        yield f"guards.length.min={length.min:g} is above {key}={length.max or longest:g}: no step passes. Lower it."
    if length.max is not None and length.max >= longest:
        yield (
            f"guards.length.max={length.max:g} could never act: no response is longer than "
            f"rollout.max_new_tokens={longest}. Lower it, or leave it out."
        )
    if jump.max is not None and jump.window >= config.ppo.steps:
        yield (
            f"guards.reward_jump.window={jump.window} could never be full in ppo.steps={config.ppo.steps}. Set a "
            "smaller window, or leave guards.reward_jump.max out."
        )
    if failed.max is not None and failed.max >= config.reward.max_failed_fraction:
        yield (
            f"guards.failed_rewards.max={failed.max:g} could never act: the run stops above "
            f"reward.max_failed_fraction={config.reward.max_failed_fraction:g}. Lower the first or raise the second."
        )


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and applies dotted overrides `section.key=value` (value in YAML).

    Raises:
        ConfigError: no such file, not YAML, an unknown key (with the nearest known one), a wrong type, or keys
            that contradict each other.
    """
    tree = _read_yaml(path) if path else {}
    for override in overrides:
        _apply_override(tree, override)
    return config_from_tree(tree, source=str(path) if path else "the command line")


def config_from_tree(tree: Mapping[str, Any], *, source: str) -> Config:
    for key in _credentials("", tree):
        raise ConfigError(
            f"{source}: {key} holds a credential, which would reach the process list, logs, config.yaml and reports. "
            f"Take it out of the URL; {_CREDENTIAL_PLACES.get(key, 'give it by the environment')}."
        )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()[:_SHOWN_ERRORS]]
        if error.error_count() > _SHOWN_ERRORS:
            lines.append(f"and {error.error_count() - _SHOWN_ERRORS} more")
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def _credentials(prefix: str, value: Any) -> Iterator[str]:
    """Names of the keys whose values are URLs with a credential."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _credentials(f"{prefix}.{name}" if prefix else str(name), inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _credentials(prefix, inner)
    elif isinstance(value, str) and has_credential(value):
        yield prefix


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path, f"--config: config file {path}", ConfigError, max_bytes=MAX_YAML_BYTES)
    tree = _parsed(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (`ppo:`, `model:`, ...), found {type(tree).__name__}.")
    return tree


def _parsed(text: str, what: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    shown = f"override {_shortened(override)!r}"
    if not separator or not key:
        raise ConfigError(f"{shown} is not of the form section.key=value, e.g. ppo.steps=10.")
    value = _parsed(text, f"value of {shown}")
    *sections, leaf = key.strip().split(".")
    if len(sections) > _DEEPEST_KEY:
        raise ConfigError(f"{shown}: no key has {len(sections)} sections before it.")
    for section in sections:
        child = tree.get(section)
        if child is None:
            child = tree[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{shown}: {_shortened(section)!r} is a value, not a section.")
        tree = child
    tree[leaf] = value


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _explain(error: Any) -> str:
    location = _shortened(".".join(str(part) for part in error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {location!r}{_suggestion(error['loc'])}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{location}: {error['msg'].lower()}, got {reprlib.repr(error['input'])}."


def _suggestion(location: tuple[int | str, ...]) -> str:
    *parents, key = (part for part in location if isinstance(part, str))
    section: type[BaseModel] = Config
    for parent in parents:
        section = _section_type(section.model_fields[parent].annotation)
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)
    prefix = ".".join([*parents, ""])
    if near:
        return f"; did you mean {prefix + near[0]!r}?"
    elsewhere = [
        f"{name}.{key}"
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, Section)
        and key in field.annotation.model_fields
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; known here: {', '.join(section.model_fields)}."


def _section_type(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if inner not in (types.NoneType, Ellipsis):
            return _section_type(inner)
    raise TypeError(f"{annotation} holds no section")
