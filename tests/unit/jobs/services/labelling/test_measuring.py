"""`rlhf label add RUN --choose active`: from the samples and the reward model of a run to items."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from jobs.services.labelling.command import app
from jobs.services.labelling.items.measuring import states_of
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items
from orchestrator.errors import ConfigError, DataError
from tests.tiny import tiny_llama, tiny_scorer
from tests.unit.actors.rewards.rollouts import rollout_table

NUM_PROMPTS, REPLIES = 12, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with samples and a reward model of two heads."""
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    policy = tiny_llama(folder.parent / "policy")
    tiny_scorer(folder / "stages" / "first" / "reward-model", heads=2)
    (folder / "config.yaml").write_text(json.dumps({"model": {"path": str(policy), "dtype": "float32"}}))
    texts = [f"reply {reply} to {prompt}" for prompt in range(NUM_PROMPTS) for reply in range(REPLIES)]
    metas = [{"messages": [{"role": "user", "content": f"Question {n // REPLIES}?"}]} for n in range(len(texts))]
    tokens = [[5 + n, 7, 0] for n in range(len(texts))]
    table = rollout_table(texts, metas=metas, response_tokens=tokens).to_pylist()
    for number, row in enumerate(table):
        row |= {"prompt_id": f"p{number // REPLIES}", "sample_index": number % REPLIES, "row": number}
    schema = rollout_table(["x"]).schema
    pq.write_table(type(rollout_table(["x"])).from_pylist(table, schema), folder / "samples.parquet")
    return folder


def test_an_active_choice_of_a_run_comes_with_its_control_arm(run: Path, tmp_path: Path) -> None:
    store = tmp_path / "labels.db"
    command = ["add", str(run), "--choose", "active", "--budget", "6", "--control", "0.34", "--store", str(store)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "3 items chosen, 3 drawn at random; 0 prompts were known" in done.output.replace("\n", " ")
    with Store(str(store)).reading() as connection:
        found = connection.execute(select(items)).all()
    assert len(found) == 6 and {item.source["choice"]["arm"] for item in found} == {"active", "control"}
    states = states_of(run, stage=None, step=None, model=None, say=lambda line: None).to_pylist()
    for item in found:
        first = REPLIES * int(item.prompt_id[1:])
        means = [sum(state["heads"]) / 2 for state in states[first : first + REPLIES]]
        assert [reply["source"]["score"] for reply in item.replies] == pytest.approx(means, abs=1e-5)
        assert item.source["choice"]["information"] >= 0.0
    again = CliRunner().invoke(app, [*command[:5], "99", *command[6:]])
    assert again.exit_code == 0 and "6 items added" in again.output, again.output


def test_what_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs the folder of a run, with its config\.yaml"):
        states_of(tmp_path, stage=None, step=None, model=None, say=print)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(DataError, match=r"holds no samples\.parquet"):
        states_of(tmp_path, stage=None, step=None, model=None, say=print)
    (tmp_path / "samples.parquet").write_bytes((run / "samples.parquet").read_bytes())
    with pytest.raises(DataError, match=r"holds no reward model: .*--reward-model, or --choose random"):
        states_of(tmp_path, stage=None, step=None, model=None, say=print)
    given = states_of(tmp_path, stage=None, step=None, model=run / "stages/first/reward-model", say=lambda line: None)
    assert given.num_rows == NUM_PROMPTS * REPLIES
    alone = CliRunner().invoke(app, ["add", str(run), "--budget", "3", "--store", str(tmp_path / "labels.db")])
    assert alone.exit_code == 2 and "belong together" in alone.output
