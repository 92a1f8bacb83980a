"""Stage `evaluate`: compares the policy with another model on held-out prompts; a pipeline can require results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jobs.stages.rewarding import environments, reward_inputs, reward_uses
from jobs.stages.sample import policy_use
from jobs.stages.stage import Artifact, Costs, Inputs, ModelUse, Stage
from orchestrator.config.config import Config
from orchestrator.planning.demands import REWARD_MODEL, engine_demand, reward_demand
from orchestrator.planning.placement import Node, Plan, place
from orchestrator.run.folder import RunFolder
from orchestrator.run.storage import read_json

if TYPE_CHECKING:
    from jobs.prepare import Prepared

EVALUATION = "evaluation"
RESULT_FILE = "result.json"


class Evaluate(Stage):
    kind = "evaluate"
    start_s = 40.0
    sections = (
        "demonstrations",
        "environment",
        "evaluate",
        "evaluation",
        "prompts",
        "reference",
        "reward",
        "reward_model",
        "rollout",
        "sft",
    )
    samples = True
    starts_from_policy = True
    uses = (REWARD_MODEL,)
    checks = (
        "jobs.check.rewards:check_gold",
        "jobs.check.rewards:check_reward",
        "jobs.check.environments:check_environment",
        "jobs.check.rewards:check_pair_judge",
        "jobs.check.prompts:enough_to_evaluate",
        "jobs.check.demonstrations:check_demonstrations",
        "jobs.check.tasks:check_tasks",
    )

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(EVALUATION, "evaluate"),)

    def inputs(self, config: Config) -> Inputs:
        reward = reward_inputs(config)
        gold = {config.evaluation.gold} if config.evaluation.gold else set()
        models = {**reward.models, "evaluate.against": config.evaluate.against, "model.path": config.model.path}
        judge = config.evaluate.judge
        own = {
            "evaluate.judge.template": judge.template if judge else None,
            "demonstrations.path": config.demonstrations.path,
        }
        files = {**reward.files, **own}
        return Inputs(files=files, models=models, rules=reward.rules | gold | environments(config))

    def models(self, config: Config) -> Iterable[ModelUse]:
        yield policy_use(config, exports=False)
        yield from reward_uses(config)
        if config.evaluate.against is not None:
            longest = config.model.max_length
            yield ModelUse("evaluate.against", config.evaluate.against, scores=False, window=longest)

    def problems(self, config: Config) -> Iterable[str]:
        if not config.evaluation.prompts:
            yield "stage 'evaluate' needs held-out prompts, and evaluation.prompts=0: raise it."

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        engines = place([engine_demand(config)], nodes, mode=config.placement.mode)
        place([reward_demand(config)], nodes, mode=config.placement.mode)
        return engines

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return 2 * costs.sampling(prepared.prompts.held_out[: costs.config.evaluation.prompts], 1)

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        path = run.place / "evaluate" / RESULT_FILE
        return path.exists() and not read_json(path)["unmet"]
