"""Preflight: checks that all models of a run read the same tokens, and where replies end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.models.model import resolve_model
from actors.models.size import num_embeddings
from actors.text.conversations import Chat, reward_chat
from actors.text.tokenizing import has_tokenizer, load_tokenizer
from actors.training.ranked_tokens import judged
from jobs.prepare import start_chat
from jobs.stages.stage import Found
from jobs.stages.work.data.judged import sample
from orchestrator.config.config import Config
from orchestrator.config.losses import Judgement
from orchestrator.config.rewards import main_reward_model, reward_models
from orchestrator.data.records import Message, messages_from_dicts
from orchestrator.errors import DataError, RlhfError
from orchestrator.training.ranking import spread

TRIED = 200  # number of conversations to format for the reward model
_QUESTION = (Message("user", "Is it?"),)
_ANSWER = "Yes."


def describe_chat(chat: Chat) -> list[str]:
    """Lines for the console: where replies end, and an example of a learned reply."""
    stops = ", ".join(f"{chat.text([stop])!r} ({stop})" for stop in chat.stops)
    closing = f"{chat.text(chat.closing)!r} (token {', '.join(map(str, chat.closing))})"
    lines = [f"a reply ends with {closing}; engines stop at {stops}"]
    try:
        learned = chat.text(chat.reply(_QUESTION, _ANSWER).tokens)
    except RlhfError as error:
        return [*lines, f"a reply as it is learned can't be shown: {error}"]
    return [*lines, f"a reply as it is learned: {learned!r}"]


def require_embeddings(config: Config, policy: Chat | None) -> None:
    """Raises DataError if the policy's tokenizer has ids without an embedding."""
    if policy is not None:
        _vocabulary(config, "model.path", config.model.path, policy).require_embeddings()


def check_vocabularies(config: Config, found: Found) -> None:
    """Policy, reference and critic get the same token ids, which must have the same meaning for all of them.

    Raises:
        DataError: names the two models, a token that differs, and a remedy.
    """
    if found.chat is None:
        return
    mine = _vocabulary(config, "model.path", config.model.path, found.chat)
    if config.reference.path is not None:
        reference = _vocabulary(config, "reference.path", config.reference.path)
        mine.require_same(reference, "Set reference.path=null, or reference.path to a model")
    key, start = _critic_start(config)
    if config.algorithm.needs_critic and start not in (None, config.model.path):
        way_out = (
            f"Set critic.path={config.model.path} (the policy with a new head) or algorithm.name=grpo (no critic), or "
            "critic.path to a model"
        )
        mine.require_same(_vocabulary(config, f"the critic starts from {key}", str(start)), way_out)


def check_training_conversations(config: Config, found: Found) -> str | None:
    """Formats conversations as the training of a reward model will.

    Raises:
        DataError: its template refuses one, or it has no template and a different vocabulary than the policy.
    """
    if found.chat is None:
        return None
    model, chat = config.reward_model.base or config.model.path, start_chat(config)
    _write_judged(config, config.reward_model.loss.judgement, chat)
    return _written(config, found, "reward_model.base", model, chat)


def check_preferred_conversations(config: Config, found: Found) -> str | None:
    """Writes conversations as the training of the policy on preferences will. Raises DataError as above."""
    if found.chat is not None:
        _write_judged(config, config.preference.loss.judgement, found.chat)
    return None


def _write_judged(config: Config, judgement: Judgement, chat: Chat) -> None:
    if config.preferences.path is None:
        return
    for record in sample(config, judgement).some:
        with _naming(f"preference {record.id!r}"):
            for reply in judged(record)[0]:
                chat.reply(record.messages, reply, record.tools)


def check_scoring_conversations(config: Config, found: Found) -> str | None:
    """The same for external reward models, which score samples."""
    lines = []
    for key, source in reward_models(config.reward).items():
        if found.chat is not None and source.path is not None:
            folder = resolve_model(source.path, config.run.cache)
            chat = reward_chat(folder, found.chat, trust_remote_code=config.model.trust_remote_code)
            lines.append(_written(config, found, f"{key}.path", source.path, chat))
    return "\n".join(lines) or None


def _written(config: Config, found: Found, key: str, model: str, chat: Chat) -> str:
    _vocabulary(config, key, model, chat).require_embeddings()
    prompts = () if found.prepared is None else found.prepared.prompts.train or found.prepared.prompts.reward_model
    for prompt in spread(prompts, TRIED):
        with _naming(f"prompt {prompt.id!r}"):
            chat.reply(messages_from_dicts(prompt.meta["messages"]), _ANSWER, prompt.meta.get("tools", ()))
    name = f"{key.removesuffix('.path')} (reward model)" if key.startswith("reward.sources.") else "reward model"
    if found.chat is not None and chat.fingerprint == found.chat.fingerprint:
        return f"{name}: same conversation format as the policy; it reads the sampled tokens"
    learned = chat.text(chat.reply(_QUESTION, _ANSWER).tokens)
    return f"{name}: its own conversation format; it reads text. A reply as it is scored: {learned!r}"


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}, as written for the reward model: {error}") from error


@dataclass(frozen=True)
class _Vocabulary:
    """Token ids of a model: their meaning in its tokenizer (None: no tokenizer), and the number of its embeddings."""

    key: str
    folder: Path
    ids: Mapping[str, int] | None
    num_embeddings: int

    def require_embeddings(self) -> None:
        """Raises DataError if the tokenizer has ids for which the model has no embedding."""
        largest = max((self.ids or {}).values(), default=-1)
        if largest >= self.num_embeddings:
            token = next(text for text, number in (self.ids or {}).items() if number == largest)
            raise DataError(
                f"{self.key}: the tokenizer in {self.folder} has token {largest} ({token!r}), and the model has "
                f"embeddings for {self.num_embeddings} tokens only. Save the model after resize_token_embeddings, or "
                "the tokenizer without the tokens that were added."
            )

    def require_same(self, other: _Vocabulary, way_out: str) -> None:
        """Raises DataError if `other` reads this model's tokens differently, or has no embeddings for them."""
        problem = self._difference(other)
        if problem is not None:
            raise DataError(
                f"{other.key}: {other.folder} gets the token ids of model.path={self.folder}, and {problem}; its "
                f"numbers would mean nothing. {way_out} with the policy's vocabulary."
            )

    def _difference(self, other: _Vocabulary) -> str | None:
        if self.ids is not None and other.ids is not None:
            for text, number in self.ids.items():
                if other.ids.get(text) != number:
                    return f"{text!r} is token {number} for the one and {other.ids.get(text, 'no token')} for the other"
        elif self.num_embeddings != other.num_embeddings:
            return f"has {other.num_embeddings} embeddings where the policy has {self.num_embeddings}, and no tokenizer"
        if other.num_embeddings < self.num_embeddings:
            return f"has {other.num_embeddings} embeddings where the policy can sample {self.num_embeddings} tokens"
        return None


def _vocabulary(config: Config, key: str, model: str, chat: Chat | None = None) -> _Vocabulary:
    folder, trust = resolve_model(model, config.run.cache), config.model.trust_remote_code
    if chat is not None:
        ids: Mapping[str, int] | None = chat.vocabulary
    else:
        ids = load_tokenizer(folder, trust_remote_code=trust).get_vocab() if has_tokenizer(folder) else None
    return _Vocabulary(key, folder, ids, num_embeddings(folder, trust_remote_code=trust))


def _critic_start(config: Config) -> tuple[str, str | None]:
    """(key, model) from which the critic starts; None: the policy with a new head."""
    if config.critic.path is not None:
        return "critic.path", config.critic.path
    main = main_reward_model(config.reward)
    if main is None:
        return "model.path", None
    key, source = main
    if source.path is not None:
        return f"{key}.path", source.path
    return "reward_model.base", config.reward_model.base
