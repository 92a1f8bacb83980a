"""Everything that can be known before an actor starts: prompts read, rendered, filtered and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.learning.model import resolve_model
from actors.tokens import load_tokenizer, prepare_prompts
from orchestrator.config import Config
from orchestrator.data.readers import read_prompts
from orchestrator.data.records import ReadReport
from orchestrator.errors import ConfigError
from orchestrator.prompts import Splits, split
from orchestrator.types import Prompt

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Prepared:
    """Prompts of a run. `left_out` lists (id, tokens) of prompts that are too long."""

    prompts: Splits[Prompt]
    report: ReadReport
    left_out: Sequence[tuple[str, int]]

    def describe(self) -> str:
        parts = self.prompts
        text = (
            f"prompts: {self.report.summary()}; {len(parts.train)} to train on, {len(parts.reward_model)} for the "
            f"reward model, {len(parts.held_out)} held out"
        )
        if self.left_out:
            shown = ", ".join(f"{name} ({length})" for name, length in self.left_out[:5])
            text += f"; {len(self.left_out)} longer than prompts.max_prompt_tokens left out: {shown}"
        return text


def prepare(config: Config) -> Prepared:
    """Reads and renders the prompts.

    Raises:
        DataError: the file, a row, the model folder, its tokenizer or its chat template.
        ConfigError: prompts may be too long for the window.
    """
    longest = config.model.max_length - config.rollout.max_new_tokens
    if config.prompts.max_prompt_tokens > longest:
        raise ConfigError(
            f"prompts.max_prompt_tokens={config.prompts.max_prompt_tokens} and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} exceed model.max_length={config.model.max_length}. Set "
            f"prompts.max_prompt_tokens={longest} or raise model.max_length."
        )
    records, report = read_prompts(find_data(config.prompts.path), config.prompts.format, config.prompts.limit)
    tokenizer = load_tokenizer(
        resolve_model(config.model.path, config.run.cache),
        chat_template=config.model.chat_template,
        trust_remote_code=config.model.trust_remote_code,
    )
    prompts, left_out = prepare_prompts(
        records, tokenizer, config.prompts.max_prompt_tokens, config.model.system_prompt
    )
    parts = split(
        prompts,
        held_out_fraction=config.prompts.held_out_fraction,
        reward_model_fraction=config.prompts.reward_model_fraction,
    )
    return Prepared(parts, report, left_out)


def find_data(path: Path) -> Path:
    """A path as given, or, for a relative one that is not there, the same below this program's own folder."""
    path = path.expanduser()
    shipped = PACKAGE_ROOT / path
    return shipped if not path.exists() and shipped.exists() else path
