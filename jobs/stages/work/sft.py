"""The work of stage `sft`: writes demonstrations as rows of tokens, and learns their replies with Ray Train."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from time import monotonic
from typing import Any

from actors.training.sft import Fitted, SftTask, SftTraining
from jobs.prepare import policy_chat
from jobs.stages.sft import DEMONSTRATIONS, RESULT_FILE
from jobs.stages.stage import POLICY, StageJob
from jobs.stages.work.data.demonstrations import store_demonstrations, stream
from jobs.stages.work.training import Report, inputs_of, of_last_tenth, train_section, words
from orchestrator.planning.demands import SFT
from orchestrator.run.storage import write_json

_RECORDED = ("loss", "perplexity", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class SftResult:
    """What the stage made and how good it is.

    Args:
        path: the policy, a Hugging Face folder.
        held_out_loss: mean negative log-likelihood of a held-out token, in nats; None: nothing is held out.
        held_out_perplexity: its exponential.
        loss: mean over the last tenth of the optimizer steps, on training tokens.
        num_records, num_rows: conversations or texts, and the rows of tokens that they make.
        num_learned_tokens: of one epoch.
        num_split, num_cut, num_lost: see actors.text.learned.
    """

    path: str
    held_out_loss: float | None
    held_out_perplexity: float | None
    loss: float
    num_records: int
    num_rows: int
    num_learned_tokens: int
    num_held_out: int
    num_split: int
    num_cut: int
    num_lost: int
    optimizer_steps: int
    seconds: float

    def describe(self) -> str:
        parts = [
            f"{self.path}: {self.num_records} records, {self.num_learned_tokens} learned tokens, "
            f"{self.optimizer_steps} optimizer steps"
        ]
        if self.held_out_loss is not None:
            parts.append(f"held-out loss {self.held_out_loss:.3f} (perplexity {self.held_out_perplexity:.2f})")
        return ", ".join([*parts, f"{self.seconds:.0f} s"])


async def run(job: StageJob) -> Mapping[str, Any]:
    """Reads the demonstrations, trains, and writes the result next to the model.

    Raises:
        CapacityError: the workers do not fit into the cluster, or it has no room in time.
        DataError: the demonstrations, the model, or a conversation that its chat template refuses.
        NonFiniteError: loss or gradient; no model is written.
        RoleError: workers failed more often than `failures` allows, or reported nothing before their deadline.
    """
    started = monotonic()
    config = job.config
    records = stream(config, job.inputs.get(DEMONSTRATIONS))
    folder = job.output(POLICY).absolute()
    stored = folder.with_name(f".{folder.name}.rows")
    train, held_out = await store_demonstrations(config, policy_chat(config), records, stored, job.say)
    key = f"sft.max_length={config.sft.max_length}"
    job.say(", ".join(filter(None, [f"sft: {records.report().summary()}", train.tokens.rows.describe(key)])))
    settings = inputs_of(SftTraining, config, config.sft, folder, num_records=train.writer.num_rows)
    fitted: Fitted
    steps, fitted = await train_section(
        config,
        config.sft,
        partial(SftTask, settings),
        (train.folder, held_out.folder),
        settings.work,
        Report(job.telemetry, job.say, SFT, settings.total_optimizer_steps, _RECORDED, words),
        identity=(*settings.identity, train.writer.digest, held_out.writer.digest),
    )
    loss = fitted.held_out_loss
    if loss is not None:
        job.telemetry.evaluation(len(steps), {"sft/held_out_loss": loss})
    result = SftResult(
        path=str(settings.folder),
        held_out_loss=loss,
        held_out_perplexity=None if loss is None else math.exp(min(loss, 700.0)),
        loss=of_last_tenth(steps, "loss"),
        num_records=train.num_records,
        num_rows=train.writer.num_rows,
        num_learned_tokens=train.writer.num_learned,
        num_held_out=held_out.num_records,
        num_split=train.tokens.rows.num_split,
        num_cut=train.tokens.rows.num_cut,
        num_lost=train.tokens.rows.num_lost,
        optimizer_steps=len(steps),
        seconds=monotonic() - started,
    )
    for unfinished in (settings.work, stored):
        shutil.rmtree(unfinished, ignore_errors=True)
    write_json(job.run.place / RESULT_FILE, asdict(result))
    job.telemetry.event("trained", **asdict(result))
    job.say(f"sft: {result.describe()}")
    return asdict(result)
