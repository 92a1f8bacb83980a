"""The table of architectures is correct: some of its rows are tried again here, all by `make architectures`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.check.engine import check_architecture
from jobs.resolve import resolved
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError
from tests.deadlines import scaled
from tests.families import tiny_folder
from tests.matrix.architectures import ALL, TABLE, rows

# Of each kind: fused, transposed, rearranged and stacked weights, experts, buffers, biased heads, windows, state
# spaces, transformers' code in vLLM, and models that vLLM does not support or supports only partly.
SOME = (
    "Llama",
    "Mistral",
    "Mixtral",
    "Qwen3-MoE",
    "Gemma 2",
    "Phi",
    "Phi-3",
    "GPT-2",
    "GPT-NeoX",
    "OPT",
    "GLM-4-MoE",
    "Apertus",
    "Cohere 2",
    "Falcon-H1",
    "MPT",
)


def table() -> list[str]:
    return [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]


@pytest.mark.timeout(scaled(600))
def test_rows_of_the_table_are_what_happens() -> None:
    committed = table()
    for row in rows(SOME):
        assert row.line() in committed


def test_the_table_has_a_row_for_every_architecture_and_every_row_says_what_to_do() -> None:
    names = [line.split(" | ")[0].removeprefix("| ") for line in table()]
    assert names == list(ALL)
    assert all(" | works |" in line or " | works with HF rollouts; vLLM: " in line for line in table())


def test_check_refuses_what_vllm_does_not_serve_and_remembers_it_and_auto_takes_hf(tmp_path: Path) -> None:
    folder = tiny_folder("MPT", tmp_path / "model")
    config = Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "reward": {"path": "/models/reward"},
            "rollout": {"engine": "vllm"},
            "run": {"cache": tmp_path / "cache"},
        }
    )
    for _ in range(2):
        with pytest.raises(ConfigError, match="MptForCausalLM was supported.*Set rollout.engine=hf"):
            check_architecture(config)
    auto = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": "auto"})})
    told: list[str] = []
    assert resolved(auto, told.append).rollout.engine == "hf"
    assert "MptForCausalLM was supported" in told[-1] and len(told) == 1
    (kept,) = (tmp_path / "cache" / "engine-trials").glob("*.json")
    kept.write_text(json.dumps({"refusal": None, "difference": 1e-6, "untried": None}))
    assert "vLLM serves this architecture" in str(check_architecture(config))
