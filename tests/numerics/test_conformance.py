"""Properties that known systems fail to have. CONTRIBUTING.md lists them with these and other tests."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import GenerationConfig

from actors.engines.contract import EngineContext, Sample, rollout_table
from actors.engines.hf_engine import HfEngine
from actors.learning import distributed
from actors.learning.objectives.objective import LearnJob, Rows
from actors.learning.objectives.table import OBJECTIVES, objective_of
from actors.rewards import Score
from actors.rewards.rules import RuleReward
from actors.roles.reward import rewards_table
from actors.text.conversations import chat_of
from jobs.report.command import write_report
from jobs.stages.work.select import _KINDS, Scored
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.experience import ExperienceSettings, assemble
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.table import ALGORITHMS
from orchestrator.config.rewards import RuleConfig, RuleLimits
from orchestrator.config.sections import ModelConfig, SelectConfig
from orchestrator.data.kinds import DEMONSTRATIONS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.prompts import PromptSchedule
from orchestrator.sampler import cut_into_shards
from orchestrator.types import Prompt, SampleRequest, Sampling, ShardRequest
from tests.numerics.ranks import group
from tests.numerics.samples import rollout
from tests.numerics.test_save_and_load import learn, make, weights
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.unit.jobs import run_folder

CHINESE = "答案：很好。“天气”怎么样？😀　𠮷"
LENGTHS = [(3, 2), (4, 3)]


def joined(rewards: pa.Table, *, ref: float = -1.5, engine: float = -1.0, kl_estimator: str = "k1-reward") -> pa.Table:
    """The experience of two responses with these rewards; old log-probs are -1."""
    table = rollout(LENGTHS)
    lists = [[engine] * length for _, length in LENGTHS]
    place = table.schema.get_field_index("engine_logprobs")
    table = table.set_column(place, table.schema.field(place), pa.array(lists, table.schema.field(place).type))

    def per_token(name: str, value: float, **more: Any) -> pa.Table:
        lists = pa.array([[value] * length for _, length in LENGTHS], pa.list_(pa.float32()))
        return pa.table({"row": table["row"], name: lists, **more})

    found, _ = assemble(
        table,
        logprobs=[per_token("logprobs", -1.0)],
        ref_logprobs=[per_token("logprobs", ref)],
        values=[per_token("values", 0.0, bootstrap_value=pa.array([0.0, 0.0], pa.float32()))],
        rewards=[rewards],
        settings=ExperienceSettings(Ppo.model_validate({"kl_estimator": kl_estimator}), samples_per_prompt=1),
        kl_coefficient=0.1,
    )
    return found


def scored(*scores: float) -> pa.Table:
    return rewards_table(rollout(LENGTHS)["row"], [Score(score) for score in scores])


def test_rollout_seeds_differ_by_step_rank_and_sample_and_not_by_the_number_of_ranks() -> None:
    prompts = [Prompt(f"p{number}", "", np.array([1], np.int32)) for number in range(3)]
    plan = PromptSchedule(prompts, seed=7, prompts_per_step=6, samples_per_prompt=4)  # each prompt twice a step

    def by_rank(step: int, ranks: int) -> list[set[int]]:
        size = 24 // ranks
        shards = cut_into_shards(step, plan.requests(step), samples_per_shard=size, sampling=Sampling())
        return [{request.seed for request in shard.requests} for shard in shards]

    steps = [by_rank(step, ranks=3) for step in range(20)]
    assert len(set.union(*(seeds for ranks in steps for seeds in ranks))) == 20 * 24
    assert [set.union(*ranks) for ranks in steps] == [by_rank(step, ranks=1)[0] for step in range(20)]


def test_a_score_of_zero_is_data_from_the_rule_to_the_experience() -> None:
    rules = [RuleConfig(function="actors.rewards.rules:exact_answer")]
    place = rollout(LENGTHS).schema.get_field_index("meta")
    table = rollout(LENGTHS).set_column(place, "meta", pa.array([json.dumps({"answer": "7"})] * 2))
    with RuleReward(rules, RuleLimits(), total_s=60.0) as source:
        scores = source.scores(table)
    assert [score.value for score in scores] == [0.0, 0.0]
    found = joined(rewards_table(table["row"], scores), ref=-1.0)
    assert found["reward"].to_pylist() == [0.0, 0.0]


def test_the_kl_penalty_is_to_the_reference_whatever_the_engine_said() -> None:
    rewards = scored(0.0, 0.0)
    # old - ref = -1 + 1.5 for each token
    assert np.allclose(np.concatenate(joined(rewards)["token_rewards"].to_pylist()), -0.1 * 0.5)
    assert joined(rewards, engine=-9.0)["token_rewards"] == joined(rewards)["token_rewards"]
    assert not np.concatenate(joined(rewards, ref=-1.0, engine=-9.0)["token_rewards"].to_pylist()).any()


def gradient(algorithm: Algorithm, *, advantages: list[float], ref: list[float], kl: float) -> list[float]:
    """Of the loss by the log-probs, where these are still the old ones."""
    old = torch.full((len(ref),), -2.0)
    logprobs = old.clone().requires_grad_()
    columns = {
        "old_logprobs": old,
        "engine_logprobs": old,
        "ref_logprobs": torch.tensor(ref),
        "advantages": torch.tensor(advantages),
    }
    job = LearnJob(0, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=kl, seed=0)
    rows = Rows(columns, torch.tensor([len(ref)]), mean_length=len(ref), max_new_tokens=len(ref))
    objective_of(algorithm).policy_terms(logprobs, torch.zeros(len(ref)), rows, job).loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad.tolist()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_good_tokens_become_likelier_and_bad_ones_less_likely(name: str) -> None:
    algorithm = ALGORITHMS[name].model_validate({})
    # d(-r A)/d log p = -A where the ratio r is 1; a descent step goes the other way.
    found = gradient(algorithm, advantages=[2.0, -3.0, 0.0], ref=[-2.0] * 3, kl=0.0)
    assert found == pytest.approx([-2.0, 3.0, 0.0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_kl_loss_draws_the_policy_to_the_reference(name: str) -> None:
    algorithm = ALGORITHMS[name].model_validate({"kl_estimator": "k3-loss"})
    # d k3/d log p = 1 - p_ref / p: too likely a token gets less likely, and the other way round.
    found = gradient(algorithm, advantages=[0.0] * 3, ref=[-2.0, -2.0 - np.log(2), -2.0 + np.log(2)], kl=0.1)
    assert found == pytest.approx([0.0, 0.1 * 0.5, 0.1 * -1.0], abs=1e-7)


def test_chinese_text_survives_sampling() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(CHINESE, add_special_tokens=False)["input_ids"]
    request = SampleRequest(0, Prompt("p", CHINESE, np.array([1], np.int32), {"answer": CHINESE}), 0, 5)
    table = rollout_table([request], [Sample(ids, [0.0] * len(ids))], chat=chat_of(tokenizer), version=0)
    [row] = table.to_pylist()
    assert row["response_text"] == row["prompt_text"] == CHINESE
    assert json.loads(row["meta"])["answer"] == CHINESE


@pytest.mark.parametrize("kept", ["best", "rankings"])
def test_chinese_text_survives_selection(tmp_path: Path, kept: str) -> None:
    meta = json.dumps({"messages": [{"role": "user", "content": CHINESE}]})
    samples = [Scored("p", meta, CHINESE, 1.0), Scored("p", meta, "不好", 0.0)]
    rows = list(_KINDS[kept](samples, SelectConfig.model_validate({"keep": kept}), Counter()))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if kept == "best":
        [whole] = read_all(DEMONSTRATIONS, path)[0]
        assert [message.content for message in whole.messages] == [CHINESE, CHINESE]
    else:
        [ranked] = read_all(RANKINGS, path)[0]
        assert [*(message.content for message in ranked.messages), *ranked.replies] == [CHINESE, CHINESE, "不好"]


def test_chinese_text_survives_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "WARM", CHINESE)
    page = write_report(run_folder.write_run(tmp_path / "run"))
    assert CHINESE in page.read_text(encoding="utf-8")


def test_the_hf_engine_applies_nothing_of_generation_config_but_the_end_of_a_reply(tmp_path: Path) -> None:
    requests = [SampleRequest(i, Prompt("p", "hi", np.array([9, 17], np.int32), {}), i, i) for i in range(8)]
    shard = ShardRequest(0, 0, requests, Sampling(temperature=1.0, max_new_tokens=24))

    def sampled() -> pa.Table:
        context = EngineContext(model=ModelConfig(dtype="float32", max_length=64), threads=1, max_samples=8)
        return HfEngine(tmp_path, context).generate(shard)[0]

    tiny_llama(tmp_path)
    plain = sampled()
    hostile = GenerationConfig(
        eos_token_id=0,
        do_sample=True,
        temperature=0.1,
        top_k=2,
        top_p=0.5,
        min_p=0.4,
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        min_new_tokens=20,
        max_new_tokens=3,
        suppress_tokens=list(range(1, 200)),
    )
    hostile.save_pretrained(tmp_path)
    assert sampled().equals(plain)


@pytest.mark.parametrize("at", range(5))
def test_a_learner_resumes_from_a_checkpoint_before_the_first_update_and_after_each(
    at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("learner")
    causal = tiny_llama(folder / "causal")
    distributed.join(group())
    straight = make(causal, 1, "float32")
    learn(straight, range(at))
    (folder / "saved").mkdir()
    straight.save(folder / "saved")
    learn(straight, range(at, 4))
    resumed = make(causal, 1, "float32")
    resumed.load(folder / "saved")
    learn(resumed, range(at, 4))
    ends = weights(straight), weights(resumed)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
