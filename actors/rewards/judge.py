"""Rewards from a judge: a language model at an OpenAI-compatible endpoint of chat completions.

The template writes one user message, the judge answers, and the last match of a regular expression is its verdict. An
answer without a verdict is a failure, never a score of 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
from jinja2 import TemplateSyntaxError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import SandboxedEnvironment

from actors.rewards import RewardContext, Sample, Score, samples
from actors.rewards.endpoint import FIRST_PAUSE_S, Endpoint, RequestRefusedError
from actors.text.templates import render_text
from orchestrator.config.rewards import JudgeConfig, JudgeSource
from orchestrator.errors import ConfigError, DataError, RewardError, StorageError
from orchestrator.run.storage import read_json, write_json, writing

SHIPPED = Path(__file__).parent
SCORE_VARIABLES = ("reply", "lowest", "highest")
PAIR_VARIABLES = ("first", "second")
_COMMON_VARIABLES = ("prompt", "messages", "tools", "meta")
_LONGEST_SHOWN = 200


@dataclass(frozen=True)
class Judgement:
    """The answer to one question.

    `verdict` None is a failure, and `error` is the reason. `is_down`: the endpoint is the reason, not the question.
    """

    verdict: str | None
    text: str = ""
    error: str | None = None
    is_down: bool = False


class Judge:
    """Args:
        template: text of the Jinja template. None: the shipped file `default`.
        variables: what the template can use besides the conversation; the first must be used.
        section: its section in the config, for messages.
        cache: folder of answers, so that no question is asked twice. None: no cache.

    Raises:
        ConfigError: the URL, the token, or the template; see Endpoint.
        StorageError: the cache can't be made.
    """

    def __init__(
        self,
        judge: JudgeConfig,
        template: str | None,
        *,
        variables: Sequence[str] = SCORE_VARIABLES,
        default: str = "judge_score.jinja",
        section: str = "reward",
        cache: Path | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._judge = judge
        self._template = template if template is not None else (SHIPPED / default).read_text(encoding="utf-8")
        _check_template(self._template, variables, f"{section}.template")
        self._endpoint = Endpoint(judge, section=section, path="/chat/completions", first_pause_s=first_pause_s)
        self._name = f"{section}.template={judge.template or default}"
        self._verdict = re.compile(judge.verdict)
        self._cache = None if cache is None else _Cache(cache)

    async def judgements(self, questions: Sequence[Mapping[str, Any]], until: float) -> list[Judgement]:
        """One per question, in order.

        Args:
            questions: variables of the template.
            until: deadline on the monotonic clock.

        Raises:
            RewardError: the endpoint answers no question.
        """
        free = asyncio.Semaphore(self._judge.concurrent_requests)

        async def judge(question: Mapping[str, Any]) -> Judgement:
            async with free:
                return await self._judgement(question, until)

        found = await asyncio.gather(*map(judge, questions))
        if found and all(judgement.is_down for judgement in found):
            raise RewardError(str(found[0].error))
        return found

    async def _judgement(self, question: Mapping[str, Any], until: float) -> Judgement:
        try:
            text = render_text(self._template, question, self._name)
            known = self._cache.read(self._key(text)) if self._cache else None
            if known is not None and (found := self._parsed(known)).verdict is not None:
                return found
            answer = _content(await self._endpoint.ask(self._request(text), until))
        except (DataError, RequestRefusedError) as error:
            return Judgement(None, error=str(error))
        except RewardError as error:
            return Judgement(None, error=str(error), is_down=True)
        found = self._parsed(answer)
        if found.verdict is not None and self._cache:
            self._cache.write(self._key(text), found.text)
        return found

    def _request(self, text: str) -> Mapping[str, Any]:
        judge = self._judge
        optional = {"temperature": judge.temperature, "max_tokens": judge.max_tokens}
        given = {key: value for key, value in optional.items() if value is not None}
        return {"model": judge.model, "messages": [{"role": "user", "content": text}], **given}

    def _parsed(self, answer: str | None) -> Judgement:
        if answer is None:
            return Judgement(None, error="the judge's answer is not a chat completion with text")
        matches = self._verdict.findall(answer)
        if not matches:
            return Judgement(None, answer, error=f"the judge's answer has no verdict: {answer[-_LONGEST_SHOWN:]!r}")
        return Judgement(matches[-1], answer)

    def _key(self, text: str) -> str:
        judge = self._judge
        parts = [self._endpoint.url, judge.model, self._template, text, judge.temperature, judge.max_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Cache:
    """Answers in files that are named by the digest of their question; several processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> str | None:
        """None: there is no answer, or its file is damaged."""
        try:
            answer = read_json(self._path(key))["answer"]
        except (StorageError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, str) else None

    def write(self, key: str, answer: str) -> None:
        with suppress(OSError, StorageError):  # costs another request later, but not the answer
            self._path(key).parent.mkdir(exist_ok=True)
            write_json(self._path(key), {"answer": answer})

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


class JudgeReward:
    """Args:
        total_s: time limit for one table. Samples that are not judged in time fail.

    Raises:
        ConfigError, StorageError: see Judge.
    """

    def __init__(
        self,
        reward: JudgeSource,
        template: str | None = None,
        *,
        cache: Path | None = None,
        total_s: float = 480.0,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._judge = Judge(reward, template, cache=cache, first_pause_s=first_pause_s)
        self._lowest, self._highest = reward.score_range
        self._total_s = total_s

    def scores(self, table: pa.Table) -> list[Score]:
        """Raises RewardError if the endpoint answers no question."""
        return [self.score(judgement) for judgement in self.judgements(table)]

    def judgements(self, table: pa.Table) -> list[Judgement]:
        bounds = {"lowest": f"{self._lowest:g}", "highest": f"{self._highest:g}"}
        questions = [{**conversation(sample), "reply": sample.response, **bounds} for sample in samples(table)]
        return asyncio.run(self._judge.judgements(questions, monotonic() + self._total_s))

    def score(self, judgement: Judgement) -> Score:
        if judgement.verdict is None:
            return Score(None, error=judgement.error)
        try:
            score = float(judgement.verdict)
        except ValueError:
            return Score(None, error=f"the judge's verdict {judgement.verdict[:_LONGEST_SHOWN]!r} is not a number")
        if not self._lowest <= score <= self._highest:
            bounds = f"[{self._lowest:g}, {self._highest:g}]"
            return Score(None, error=f"the judge's score {score:g} is outside of reward.score_range={bounds}")
        return Score(score, {"judge": score})


def build(reward: JudgeSource, context: RewardContext) -> JudgeReward:
    cache = judge_cache(context.cache)
    return JudgeReward(reward, context.judge_templates.get(context.key), cache=cache, total_s=context.total_s)


def judge_cache(cache: Path) -> Path:
    """The folder of judges' answers below run.cache."""
    return cache.expanduser() / "judge"


def conversation(sample: Sample) -> dict[str, Any]:
    """The variables of a template that are about the prompt."""
    messages = sample.meta.get("messages") or [{"role": "user", "content": sample.prompt}]
    return {"prompt": sample.prompt, "messages": messages, "tools": sample.meta.get("tools"), "meta": sample.meta}


def _check_template(text: str, variables: Sequence[str], key: str) -> None:
    """Jinja writes nothing for an unknown variable, so a misspelt one would be sent as a judge's empty reply.

    Raises ConfigError.
    """
    try:
        used = meta.find_undeclared_variables(SandboxedEnvironment(extensions=[loopcontrols]).parse(text))
    except TemplateSyntaxError as error:
        raise ConfigError(f"{key}: line {error.lineno}: {error.message}. Correct the template.") from None
    known = {*_COMMON_VARIABLES, *variables}
    if unknown := sorted(used - known):
        raise ConfigError(f"{key} uses {', '.join(unknown)}; there are only {', '.join(sorted(known))}.")
    if variables[0] not in used:
        raise ConfigError(f"{key} does not use {variables[0]!r}, so the judge would not see what it judges.")


def _content(answer: Any) -> str | None:
    """The text of a chat completion."""
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None
