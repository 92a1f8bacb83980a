"""Formats conversations for one model: all roles read and write transcripts with this object.

    policy prompts, check       policy_chat
    engines, export             policy_chat: stops, text of a reply
    reward-model training       trained_chat: the base's own template, unless the base is the policy's model
    reward scoring              reward_chat: what the reward model's folder says about its training

A reply ends with the closing of its template (`<|im_end|>`, `<|eot_id|>`, ...) and nothing after it. So the last token
of a transcript in reward-model training is also the last token of a response that an engine sampled to its end.
See docs/adr/0008-conversations.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.text.closings import content_written, find_closing, marks_of, named_ends, require_content
from actors.text.templates import ChatTemplate, TemplateRefused
from actors.text.tokenizing import Tokens, encode, load_tokenizer
from actors.text.tool_turns import as_written
from orchestrator.config.sections import ModelConfig
from orchestrator.data.inputs import read_text
from orchestrator.data.records import Message, Reply, is_begun, message_dict, message_dicts
from orchestrator.errors import DataError
from orchestrator.run.storage import write_json

CHAT_FILE = "conversation.json"
_BEGUN = "577215664"  # marks the end of a begun turn


@dataclass(frozen=True, eq=False)
class Transcript:
    """A conversation and one reply in tokens: what a reward model scores."""

    prompt_tokens: Tokens
    response_tokens: Tokens  # the reply and the template's closing

    @property
    def tokens(self) -> Tokens:
        return np.concatenate([self.prompt_tokens, self.response_tokens])

    @property
    def response_mask(self) -> npt.NDArray[np.bool_]:
        """True where `tokens` belongs to the response."""
        return np.arange(len(self)) >= len(self.prompt_tokens)

    def __len__(self) -> int:
        return len(self.prompt_tokens) + len(self.response_tokens)

    def last(self, max_length: int) -> Transcript:
        """At most `max_length` tokens: the conversation loses its start, and only then the reply."""
        kept = max(max_length - len(self.response_tokens), 0)
        prompt_tokens = self.prompt_tokens[max(len(self.prompt_tokens) - kept, 0) :]
        return replace(self, prompt_tokens=prompt_tokens, response_tokens=self.response_tokens[-max_length:])


@dataclass(frozen=True, eq=False)
class Chat:
    """How conversations are written for one model. Use `chat_of` or one of the functions below to construct it.

    Args:
        closing: tokens after every reply that is learned from.
        stops: tokens at which an engine stops; the closing's last one is among them.
    """

    tokenizer: Any
    template: ChatTemplate
    system_prompt: str | None
    closing: Tokens
    stops: tuple[int, ...]

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """A conversation up to the assistant's reply: up to the end of the generation prompt or, if the last message is
        the assistant's, up to the end of that begun turn.

        Raises:
            DataError: the template refuses the conversation, or is broken.
        """
        turns = self._turns(messages)
        if not is_begun(messages):
            return self._render(turns, tools, add_generation_prompt=True)
        turns[-1] = {**turns[-1], "content": turns[-1]["content"] + _BEGUN}
        text, mark, _ = self._render(turns, tools, add_generation_prompt=False).rpartition(_BEGUN)
        if not mark:
            raise DataError(
                f"the chat template of {self.template.name} does not write an assistant's turn, so a begun one can't "
                "be continued. Leave such conversations out, or set model.chat_template=FILE."
            )
        return text

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Tokens:
        return self.tokens_of(self.prompt_text(messages, tools))

    def reply(self, messages: Sequence[Message], reply: Reply, tools: Sequence[Mapping[str, Any]] = ()) -> Transcript:
        """A conversation and a reply, closed once. Prompt and reply are tokenised separately, as in sampling.

        Args:
            reply: text, used as it is, or a message; the template writes one with more than text (tool calls).

        Raises:
            DataError: the template refuses the conversation, or writes it differently once it is answered.
        """
        return self.replies([(messages, [reply], tools)])[0][0]

    def replies(
        self, asked: Iterable[tuple[Sequence[Message], Sequence[Reply], Sequence[Mapping[str, Any]]]]
    ) -> list[list[Transcript]]:
        """As `reply`, for every reply to each of many conversations; these are tokenised together, which is faster."""
        texts: list[str] = []
        counts: list[int] = []
        for messages, replies, tools in asked:
            prompt = self.prompt_text(messages, tools)
            texts.append(prompt)
            texts += [
                reply if isinstance(reply, str) else self._answer(prompt, messages, reply, tools) for reply in replies
            ]
            counts.append(len(replies))
        tokens = (np.array(found, dtype=np.int32) for found in encode(texts, self.tokenizer))
        found = []
        for count in counts:
            prompt_tokens = next(tokens)
            found.append([Transcript(prompt_tokens, self.closed(next(tokens))) for _ in range(count)])
        return found

    def answered(
        self, messages: Sequence[Message], reply: Message, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[Tokens, Tokens]:
        """(prompt, response) of one turn to learn: the prompt as an engine gets it, the reply as the template writes it
        after that prompt (some put an empty thought before it), closed once.

        A template that writes a prompt differently once it is answered does not say what follows the prompt: then the
        response is the reply's own text.

        Raises:
            DataError: the template refuses the conversation, or leaves out a reply's tool calls.
        """
        asked = self.prompt_text(messages, tools)
        body = None
        with suppress(TemplateRefused):  # a template for prompts alone
            body = self._written(asked, messages, reply, tools)
        if body is None:
            body = self._answer(asked, messages, reply, tools)
        prompt, whole = self.tokens_of(asked), self.tokens_of(asked + body)
        follows = np.array_equal(whole[: len(prompt)], prompt)
        return prompt, self.closed(whole[len(prompt) :] if follows else self.tokens_of(body))

    def body(self, response: Tokens) -> Tokens:
        """A response without its end: the closing, or stop tokens."""
        size = len(self.closing)
        while len(response):
            if len(response) >= size and np.array_equal(response[-size:], self.closing):
                response = response[:-size]
            elif int(response[-1]) in self.stops:
                response = response[:-1]
            else:
                break
        return response

    def closed(self, response: Tokens) -> Tokens:
        """A response with exactly one closing, however it ended: cut by length, or at another stop token."""
        return np.concatenate([self.body(response), self.closing])

    def text(self, tokens: Sequence[int] | Tokens) -> str:
        """Tokens as text, with special tokens."""
        exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        if not self.tokenizer.is_fast:
            exact["spaces_between_special_tokens"] = False  # only tokenizers in Python put them in
        return str(self.tokenizer.decode(list(map(int, tokens)), **exact))

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        found: dict[str, int] = self.tokenizer.get_vocab()
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two models if and only if the same token ids mean the same text and the same conversations."""
        vocabulary = sorted(self.vocabulary.items(), key=lambda item: item[1])
        template = self.template
        today = template.today.isoformat() if template.reads_date else None
        written = [template.text, template.with_tools, today, self.system_prompt, self.closing.tolist()]
        return hashlib.sha256(json.dumps([vocabulary, written], ensure_ascii=True).encode("ascii")).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the settings of a reward model's training next to its weights, for `reward_chat`. The caller saves the
        tokenizer, which holds the template."""
        written = {
            "system_prompt": self.system_prompt,
            "today": self.template.today.isoformat(),
            "closing": self.closing.tolist(),
            "stops": list(self.stops),
        }
        write_json(folder / CHAT_FILE, written)

    def save_stops(self, folder: Path) -> None:
        """Makes an exported model stop at the same tokens, also if its own files name others."""
        file = folder / "generation_config.json"
        written = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        named = written.get("eos_token_id")
        if not {*self.stops} <= {*(named if isinstance(named, list) else [named])}:
            write_json(file, {**written, "eos_token_id": list(self.stops)})

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if self.system_prompt is not None and messages[0].role != "system":
            messages = (Message("system", self.system_prompt), *messages)
        return list(message_dicts(messages))

    def _render(
        self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> str:
        """Also raises DataError if the template leaves out tools, calls or results: many don't support them."""

        def render(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
            return self.template.render(turns, tools, add_generation_prompt=add_generation_prompt)

        return render(as_written(render, turns, tools, self.template.name), tools)

    def _answer(
        self, asked: str, messages: Sequence[Message], reply: Message, tools: Sequence[Mapping[str, Any]]
    ) -> str:
        if not message_dict(reply).keys() - {"role", "content"}:
            return reply.content
        body = self._written(asked, messages, reply, tools)
        if body is None:
            raise DataError(
                f"the chat template of {self.template.name} writes a conversation differently once it is answered, so "
                "a reply with tool calls can't be told from its prompt. Set model.chat_template=FILE."
            )
        return body

    def _written(
        self, asked: str, messages: Sequence[Message], reply: Message, tools: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """What the template writes between a prompt and the closing of its reply. None: not behind this prompt."""
        turn = message_dict(reply)
        if is_begun(messages):
            messages, turn = messages[:-1], {**turn, "content": messages[-1].content + reply.content}
        whole = self._render([*self._turns(messages), turn], tools, add_generation_prompt=False)
        if not whole.startswith(asked):
            return None
        rest, closing = whole[len(asked) :], self.text(self.closing)
        body, end, behind = rest.partition(closing)
        if behind.replace(closing, "").strip():  # the reply holds the closing, too; some templates close twice
            body, end, _ = rest.rpartition(closing)
        if end or turn.keys() - {"role", "content"}:
            return body if end else rest.rstrip()
        # No closing says where the reply ends: a mark behind it does.
        turn["content"] += _BEGUN
        whole = self._render([*self._turns(messages), turn], tools, add_generation_prompt=False)
        return whole[len(asked) :].rpartition(_BEGUN)[0]

    def tokens_of(self, text: str) -> Tokens:
        """Tokens of a text as it is, which may contain special tokens."""
        return np.array(encode([text], self.tokenizer)[0], dtype=np.int32)


def chat_of(
    tokenizer: Any,
    *,
    folder: Path | None = None,
    template: str | None = None,
    system_prompt: str | None = None,
    today: date | None = None,
) -> Chat:
    """How conversations are written for the model of a tokenizer.

    Args:
        folder: of the model, for its stop tokens.
        template: Jinja source, which is then saved with the tokenizer; None: the tokenizer's own.
        system_prompt: for conversations that bring no system message; None: the template's own default.
        today: the date that the template writes; None: today's.

    Raises:
        DataError: no template, one that is broken, or no token ends a reply.
    """
    if template is not None:
        tokenizer.chat_template = template
    written = _template(tokenizer, today or datetime.now().astimezone().date())
    ends = named_ends(folder, tokenizer)
    draft = Chat(tokenizer, written, system_prompt, np.array([], np.int32), ())

    def write(turns: Sequence[Mapping[str, str]], ask: bool) -> str:
        messages = draft._turns([Message(turn["role"], turn["content"]) for turn in turns])
        return written.render(messages, add_generation_prompt=ask)

    require_content(write, written.name)
    closing = draft.tokens_of(find_closing(write, marks_of(ends, tokenizer), written.name))
    if not len(closing):
        if tokenizer.eos_token_id is None and not ends:
            raise DataError(
                f"the chat template of {written.name} writes nothing behind a reply and there is no EOS token: "
                "nothing marks where a reply ends. Set model.chat_template=FILE to one that closes its turns."
            )
        last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends))
        closing = np.array([last], dtype=np.int32)
    return replace(draft, closing=closing, stops=tuple(sorted({*ends, int(closing[-1])})))


def load_chat(folder: Path, model: ModelConfig = ModelConfig(), template: str | None = None) -> Chat:  # noqa: B008
    """How conversations are written for the policy in `folder`, as its section and the text of model.chat_template say.

    Raises:
        DataError: see chat_of and load_tokenizer.
    """
    return chat_of(
        load_tokenizer(folder, trust_remote_code=model.trust_remote_code),
        folder=folder,
        template=template,
        system_prompt=model.system_prompt,
        today=model.today,
    )


def base_chat(folder: Path, policy: Path, model: ModelConfig, template: str | None) -> Chat:
    """How conversations are written while a reward model is trained from the model in `folder`.

    Args:
        policy: folder of the policy, whose section and template are `model` and `template`. Another base keeps its own
            template; a base without one uses the policy's if the vocabulary is the same.
    """
    if folder.resolve() == policy.resolve():
        return load_chat(folder, model, template)
    tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
    if not tokenizer.chat_template:
        _borrow(tokenizer, load_chat(policy, model, template), folder)
    return chat_of(tokenizer, folder=folder, system_prompt=model.system_prompt, today=model.today)


def reward_chat(folder: Path, policy: Chat, *, trust_remote_code: bool = False) -> Chat:
    """How transcripts are written for a trained reward model: as in its training if its folder says so, otherwise with
    its own template and the policy's system prompt and date."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        _borrow(tokenizer, policy, folder)
    kept = _read_kept(folder / CHAT_FILE)
    if kept is None:
        return chat_of(tokenizer, folder=folder, system_prompt=policy.system_prompt, today=policy.template.today)
    template = _template(tokenizer, kept.template_date)
    return Chat(tokenizer, template, kept.system_prompt, np.array(kept.closing, np.int32), tuple(kept.stops))


@dataclass(frozen=True)
class _Kept:
    system_prompt: str | None
    template_date: date
    closing: Sequence[int]
    stops: Sequence[int]


def _read_kept(file: Path) -> _Kept | None:
    if not file.exists():
        return None
    text = read_text(file, str(file), DataError)
    try:
        tree = json.loads(text)
        prompt = tree["system_prompt"]
        kept = _Kept(
            None if prompt is None else str(prompt),
            date.fromisoformat(tree["today"]),
            [int(token) for token in tree["closing"]],
            [int(token) for token in tree["stops"]],
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{file} must hold system_prompt, today, closing and stops ({error!r}); it says how the reward model was "
            "trained. Copy it again from where the model was trained."
        ) from None
    if not kept.closing:
        raise DataError(f"{file}: closing must name at least one token. Copy it again from where it was trained.")
    return kept


def _template(tokenizer: Any, today: date) -> ChatTemplate:
    """Raises DataError if the tokenizer has no template, or several of which none is the default."""
    name, found = str(tokenizer.name_or_path), tokenizer.chat_template
    if not found:
        raise DataError(
            f"the tokenizer in {name} has no chat template, so it is not known how to write a prompt for this "
            "model. Set model.chat_template=FILE (a Jinja template), or use an instruction-tuned model."
        )
    named = found if isinstance(found, Mapping) else {"default": found}
    if not all(isinstance(text, str) for text in named.values()):
        raise DataError(f"a chat template of {name} is no text. Set model.chat_template=FILE (a Jinja template).")
    if "default" not in named:
        raise DataError(
            f"the tokenizer in {name} has several chat templates ({', '.join(sorted(named))}) and none is called "
            "'default'. Set model.chat_template=FILE to a file with the one to use."
        )
    template = ChatTemplate(name, named["default"], named.get("tool_use"), tokenizer.special_tokens_map, today)
    in_parts = replace(template, in_parts=True)
    return in_parts if not _writes_content(template) and _writes_content(in_parts) else template


def _writes_content(template: ChatTemplate) -> bool:
    """Whether a template writes what the user says."""
    return content_written(lambda turns, ask: template.render(turns, add_generation_prompt=ask))


def _borrow(tokenizer: Any, policy: Chat, folder: Path) -> None:
    """Gives a tokenizer the policy's template if it has the policy's vocabulary, and so the same base."""
    if tokenizer.get_vocab() != policy.vocabulary:
        raise DataError(
            f"the tokenizer of reward model {folder} has no chat template and another vocabulary than the policy's: it "
            "is not known how to write a transcript for it. Put a chat_template.jinja into its folder."
        )
    tokenizer.chat_template = policy.tokenizer.chat_template
