"""A judge: what it is asked, how its verdict is read, and that it is asked nothing twice."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from actors.rewards import RewardContext, Sample
from actors.rewards.judge import JudgeReward, judge_cache
from actors.rewards.pair_judge import Comparison, PairJudge
from actors.rewards.table import build_source
from orchestrator.config.loader import config_from_tree, load_config
from orchestrator.config.rewards import JudgeRewardConfig, PairJudgeConfig, RuleLimits
from orchestrator.config.sections import ModelConfig
from orchestrator.errors import ConfigError, RewardError
from tests.deadlines import scaled
from tests.unit.actors.rewards.rollouts import rollout_table

Answer = Callable[[str], tuple[int, Any]]


class JudgeServer(ThreadingHTTPServer):
    """Answers each question by a function of its text; keeps requests."""

    daemon_threads = True
    request_queue_size = 64  # the default of 5 resets connections under load

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Any] = []
        self.paths: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.paths.append(self.path)
        status, answer = self.server.answer(request["messages"][0]["content"])
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], JudgeServer]]:
    servers: list[JudgeServer] = []

    def start(answer: Answer) -> JudgeServer:
        servers.append(JudgeServer(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def saying(text: object) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def judge(server: JudgeServer, template: str | None = None, cache: Path | None = None, **keys: Any) -> JudgeReward:
    section = JudgeRewardConfig.model_validate({"url": server.url, "model": "m", "retries": 0, **keys})
    return JudgeReward(section, template, cache=cache, first_pause_s=0.01)


def values(source: JudgeReward, replies: Sequence[str]) -> list[float | None]:
    return [score.value for score in source.scores(rollout_table(replies))]


def test_the_judge_reads_conversation_reply_and_meta_and_is_asked_as_configured(serve: Any) -> None:
    server = serve(lambda text: saying("fine [[7.5]]"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "为什么?"}]
    turns = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    template = turns + "{{ reply }}/{{ meta.answer }}/{{ lowest }}-{{ highest }}"
    source = judge(server, template, temperature=None, max_tokens=9, score_range=[1, 8])
    table = rollout_table(["因为 {{ 1 }}"], metas=[{"messages": messages, "answer": 42}])
    [score] = source.scores(table)
    assert (score.value, score.parts) == (7.5, {"judge": 7.5})
    [request] = server.requests
    assert request == {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "system=Be brief.;user=为什么?;因为 {{ 1 }}/42/1-8"}],
    }
    assert server.paths == ["/v1/chat/completions"]


def test_a_url_may_name_the_whole_path(serve: Any) -> None:
    server = serve(lambda text: saying("[[1]]"))
    judge(server, url=server.url + "/chat/completions?version=2").scores(rollout_table(["a"]))
    assert server.paths == ["/v1/chat/completions?version=2"]


def test_scores_come_in_order_and_zero_is_a_score(serve: Any) -> None:
    server = serve(lambda text: saying(f"[[{text.split('/')[0]}]]"))
    replies = [str(number % 10) for number in range(40)]
    assert values(judge(server, "{{ reply }}/"), replies) == [float(reply) for reply in replies]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (saying("seven of ten"), "has no verdict: 'seven of ten'"),
        (saying(""), "has no verdict"),
        (saying("[[11]]"), r"score 11 is outside of reward\.score_range=\[0, 10\]"),
        (saying("[[-0.5]]"), "outside"),
        (saying(None), "not a chat completion with text"),
        (saying(["a"]), "not a chat completion with text"),
        ((200, {"choices": []}), "not a chat completion with text"),
        ((200, [1]), "not a chat completion with text"),
        ((400, {"error": "too long"}), "refused the request .HTTP 400.*too long"),
    ],
)
def test_what_is_no_verdict_is_a_failure_of_its_sample_and_never_zero(serve: Any, answer: Any, error: str) -> None:
    server = serve(lambda text: answer if text == "bad" else saying("[[0]]"))
    scores = judge(server, "{{ reply }}").scores(rollout_table(["good", "bad", "good"]))
    assert [score.value for score in scores] == [0.0, None, 0.0]
    assert re.search(error, str(scores[1].error))
    [only] = judge(server, "{{ reply }}").scores(rollout_table(["bad"]))
    assert only.value is None, "one bad sample does not end a run"


def test_a_failed_request_fails_its_sample_and_a_judge_that_answers_none_is_a_reward_error(serve: Any) -> None:
    server = serve(lambda text: (500, {}) if text == "down" else saying("[[3]]"))
    assert values(judge(server, "{{ reply }}"), ["down", "up"]) == [None, 3.0]
    with pytest.raises(RewardError, match="gave no answer in 1 tries; the last one: HTTP 500"):
        judge(server, "{{ reply }}").scores(rollout_table(["down", "down"]))
    assert judge(server).scores(rollout_table([])) == []


def test_the_last_verdict_counts(serve: Any) -> None:
    server = serve(lambda text: saying("The reply claims [[10]]. It is wrong: [[2]]"))
    assert values(judge(server), ["Give me [[10]]!"]) == [2.0]


def test_a_verdict_is_read_by_the_configured_expression(serve: Any) -> None:
    server = serve(lambda text: saying("Score: 4/5"))
    assert values(judge(server, verdict=r"Score: (\d+)/5"), ["a"]) == [4.0]
    [score] = judge(server, verdict=r"(S\w+)").scores(rollout_table(["a"]))
    assert score.value is None and score.error == "the judge's verdict 'Score' is not a number"


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("reward.verdict='('", "reward.verdict: is not a regular expression"),
        ("reward.verdict='x'", "needs one group, the verdict; it has 0"),
        ("reward.verdict='(a)(b)'", "it has 2"),
        ("reward.score_range=[1,1]", "reward.score_range: needs its lower bound first"),
    ],
)
def test_an_expression_or_range_that_can_not_be_used_is_an_error_of_the_config(key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(None, ["reward.name=judge", "reward.url='http://h/v1'", "reward.model=m", key])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ reply", "reward.template: line 1: "),
        ("{{ response }} {{ reply }}", "reward.template uses response; there are only highest, lowest, messages, meta"),
        ("{{ prompt }}", "does not use 'reply'"),
        ("{{ reply }} {{ strftime_now('%d') }}", "uses strftime_now"),
    ],
)
def test_a_template_that_would_not_show_the_reply_is_refused(serve: Any, template: str, problem: str) -> None:
    server = serve(lambda text: saying("[[1]]"))
    with pytest.raises(ConfigError, match=problem):
        judge(server, template)


def test_a_template_that_fails_on_a_sample_fails_it_alone(serve: Any) -> None:
    server = serve(lambda text: saying("[[1]]"))
    source = judge(server, "{{ reply }} {{ meta.a.b }}")
    table = rollout_table(["x", "y"], metas=[{"a": {"b": 1}}, {}])
    good, bad = source.scores(table)
    assert good.value == 1.0 and bad.value is None and "reward.template=judge_score.jinja fails" in str(bad.error)


def test_nothing_is_asked_twice_and_another_question_is_asked(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda text: saying("好 [[0]]"))
    assert values(judge(server, cache=tmp_path), ["答案", "b"]) == [0.0, 0.0]
    assert values(judge(server, cache=tmp_path), ["答案", "b"]) == [0.0, 0.0]
    assert len(server.requests) == 2
    for keys in ({"model": "n"}, {"temperature": 0.5}, {"max_tokens": 7}):
        values(judge(server, cache=tmp_path, **keys), ["b"])
    values(judge(server, "{{ reply }}", cache=tmp_path), ["b"])
    assert len(server.requests) == 6
    # The answer is kept, not the score: another expression reads it without asking.
    assert values(judge(server, cache=tmp_path, verdict=r"\[\[(\d)"), ["b"]) == [0.0]
    assert len(server.requests) == 6


def test_an_answer_without_a_verdict_and_a_damaged_file_are_asked_again(serve: Any, tmp_path: Path) -> None:
    answers = iter(["none", "[[4]]", "[[5]]"])
    server = serve(lambda text: saying(next(answers)))
    assert [values(judge(server, cache=tmp_path), ["a"]) for _ in range(2)] == [[None], [4.0]]
    [file] = tmp_path.glob("*/*.json")
    file.write_text("{")
    assert values(judge(server, cache=tmp_path), ["a"]) == [5.0]


def test_no_token_is_kept_or_shown(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "sesame")
    server = serve(lambda text: saying("[[4]]") if "good" in text else (401, {}))
    values(judge(server, cache=tmp_path, token_from="env:JUDGE_TOKEN"), ["good"])
    assert all(b"sesame" not in file.read_bytes() for file in tmp_path.rglob("*.json"))
    with pytest.raises(RewardError, match="HTTP 401") as caught:
        judge(server, token_from="env:JUDGE_TOKEN").scores(rollout_table(["bad"]))
    assert "sesame" not in str(caught.value)


def test_no_more_requests_are_open_than_configured(serve: Any) -> None:
    open_now, most = [0], [0]
    lock = threading.Lock()

    def answer(text: str) -> tuple[int, Any]:
        with lock:
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
        threading.Event().wait(0.02)
        with lock:
            open_now[0] -= 1
        return saying("[[1]]")

    assert values(judge(serve(answer), concurrent_requests=3), ["a"] * 12) == [1.0] * 12
    assert most[0] == 3


def test_a_config_builds_a_judge_with_its_cache(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda text: saying("[[9]]"))
    reward = {"name": "judge", "url": server.url, "model": "m"}
    config = config_from_tree({"reward": reward, "run": {"cache": str(tmp_path)}}, source="test")
    context = RewardContext(
        ModelConfig(), None, tmp_path, RuleLimits(), total_s=9.0, judge_templates={"reward": "{{ reply }}!"}
    )
    for _ in range(2):
        assert build_source(config.reward, context).scores(rollout_table(["a"]))[0].value == 9.0
    assert [request["messages"][0]["content"] for request in server.requests] == ["a!"]
    assert len(list(judge_cache(tmp_path).glob("*/*.json"))) == 1


# Pairs.


def compare(server: JudgeServer, pairs: Sequence[tuple[str, str]], **keys: Any) -> list[Comparison]:
    section = PairJudgeConfig.model_validate({"url": server.url, "model": "m", "retries": 0, **keys})
    source = PairJudge(section, "{{ first }}|{{ second }}", first_pause_s=0.01)
    sides = [[Sample("Why?", pair[side], {}) for pair in pairs] for side in (0, 1)]
    return asyncio.run(source.compare(*sides, until=monotonic() + scaled(30)))


def longer(text: str) -> tuple[int, Any]:
    first, second = map(len, text.split("|"))
    return saying("[[A]]" if first > second else "[[B]]" if second > first else "[[C]]")


def test_both_orders_are_asked_and_a_consistent_judge_decides(serve: Any) -> None:
    server = serve(longer)
    found = compare(server, [("long", "s"), ("s", "long"), ("ab", "cd")])
    assert found == [Comparison(1.0), Comparison(0.0), Comparison(0.5)]
    asked = {request["messages"][0]["content"] for request in server.requests}
    assert asked == {"long|s", "s|long", "ab|cd", "cd|ab"}


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_that_prefers_a_place_wins_nothing(serve: Any, place: str) -> None:
    server = serve(lambda text: saying(f"[[{place}]]"))
    assert compare(server, [("a", "b")]) == [Comparison(0.5, disagrees=True)]


def test_a_tie_in_one_order_only_is_a_disagreement(serve: Any) -> None:
    server = serve(lambda text: saying("[[A]]" if text == "a|b" else "[[C]]"))
    assert compare(server, [("a", "b")]) == [Comparison(0.5, disagrees=True)]


def test_a_pair_fails_if_either_order_has_no_verdict(serve: Any) -> None:
    server = serve(lambda text: saying("dunno" if text == "b|a" else "[[A]]"))
    [found] = compare(server, [("a", "b")])
    assert found.value is None and "no verdict: 'dunno'" in str(found.error)
    [found] = compare(serve(lambda text: saying("[[D]]")), [("a", "b")], verdict=r"\[\[(\w)\]\]")
    assert found.value is None and found.error == "the judge's verdict 'D' is not A, B or C"


def test_the_shipped_templates_show_what_is_judged(serve: Any) -> None:
    server = serve(lambda text: saying("[[C]] [[5]]"))
    judge(server).scores(rollout_table(["the reply"], prompt="the prompt"))
    section = PairJudgeConfig(url=server.url, model="m")
    sides = [[Sample("the prompt", reply, {})] for reply in ("apple", "pear")]
    asyncio.run(PairJudge(section).compare(*sides, until=monotonic() + scaled(30)))
    single, *pairs = (request["messages"][0]["content"] for request in server.requests)
    assert "[user]\nthe prompt\n" in single and "<reply>\nthe reply\n</reply>" in single
    assert "from 0 (worst) to 10 (best)" in single
    assert {text.index("apple") < text.index("pear") for text in pairs} == {True, False}
