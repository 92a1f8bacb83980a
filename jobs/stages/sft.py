"""Stage `sft`: supervised fine-tuning of the policy on demonstrations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobs.command import imported
from jobs.stages.stage import POLICY, Artifact, Costs, Inputs, ModelUse, Sizes, Stage
from orchestrator.config.config import Config
from orchestrator.planning.demands import SFT, plan_training
from orchestrator.planning.disk import Disk, training_disk
from orchestrator.planning.placement import Node, Plan
from orchestrator.run.folder import RunFolder

if TYPE_CHECKING:
    from jobs.prepare import Prepared

DEMONSTRATIONS = "demonstrations"
RESULT_FILE = "sft.json"


class Sft(Stage):
    kind = "sft"
    start_s = 25.0
    sections = ("sft", "demonstrations")
    leaves = (RESULT_FILE,)
    starts_from_policy = True
    checks = ("jobs.check.demonstrations:check_demonstrations",)
    instead = MappingProxyType({DEMONSTRATIONS: "give a file of conversations: demonstrations.path"})

    def reads(self, config: Config) -> Sequence[str]:
        return (DEMONSTRATIONS,) if config.demonstrations.path is None else ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(POLICY, "sft"),)

    def problems(self, config: Config) -> Iterable[str]:
        if config.sft.max_length > config.model.max_length:
            yield (
                f"sft.max_length={config.sft.max_length} exceeds the policy's window model.max_length="
                f"{config.model.max_length}: raise that, or lower sft.max_length."
            )

    def inputs(self, config: Config) -> Inputs:
        return Inputs(files={"demonstrations.path": config.demonstrations.path})

    def models(self, config: Config) -> Iterable[ModelUse]:
        section = config.sft
        yield ModelUse(
            "model.path",
            config.model.path,
            scores=False,
            window=section.max_length,
            window_key="sft.max_length",
            checkpointing=section.gradient_checkpointing,
            exports=True,
        )

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return plan_training(SFT, config.sft, nodes)

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        size = sizes.of(config.model.path)
        return training_disk(size.num_params, saves=config.sft.checkpoint_every_steps > 0)

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        if costs.config.demonstrations.path is None:
            return costs.sft_on_samples(prepared.prompts)
        return costs.sft(imported("jobs.stages.work.demonstrations:sizes")(costs.config, prepared.chat))

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        return (run.place / RESULT_FILE).exists()
