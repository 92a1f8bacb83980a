"""The end of a reply: the closing that a chat template writes, and the stop tokens of a model's folder.

Both must agree: if an engine samples past the closing, or a reward model learns another end than the sampled one,
results are wrong without an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from actors.text.templates import TemplateRefused
from orchestrator.data.inputs import read_text
from orchestrator.errors import DataError

_MAX_JSON_BYTES = 16 << 20
# Turns of the test conversations below: digits pass any filter of a template unchanged (upper, escape, tojson).
FIRST, REPLY, SECOND = "314159265", "271828182", "141421356"

# (turns, whether the assistant is to speak next) -> text
Write = Callable[[Sequence[Mapping[str, str]], bool], str]


@dataclass(frozen=True)
class Marks:
    """Tokens of a tokenizer that may end a turn, as text.

    Args:
        ends: named by the tokenizer or the model's files as the end of a reply.
        added: added to the vocabulary as a whole, special or not.
    """

    ends: frozenset[str]
    added: frozenset[str]

    def pieces(self, text: str) -> list[str]:
        """The text in marks and single characters."""
        marks = sorted(self.ends | self.added, key=len, reverse=True)
        return re.findall("|".join([*map(re.escape, marks), r"[\s\S]"]), text)


def find_closing(write: Write, marks: Marks, name: str) -> str:
    """What the template writes after a reply, up to the mark that ends it; "" if it writes no end.

    A generation prompt that a template always adds, and the beginning of the next turn, are not part of the closing.

    Raises:
        DataError: replies end in plain text, at which no engine can stop; or the template is broken.
    """
    after = _behind(REPLY, _written(write, [("user", FIRST), ("assistant", REPLY)]))
    if after is None:
        return ""  # a template for prompts only: it refuses replies, or leaves them out
    followed = _written(write, [("user", FIRST), ("assistant", REPLY), ("user", SECOND)])
    between = _behind(REPLY, followed, until=SECOND)
    pieces = marks.pieces(after)
    if between is not None and not between.startswith(after):
        # The template treats the last turn differently: only the common part closes a reply.
        pieces = _common(pieces, marks.pieces(between))
        closing = _cut(pieces, marks, first=True)
    else:
        closing = _cut(pieces, marks, first=between is None)
    if closing or not (rest := "".join(pieces).strip()):
        return closing
    if _begins_a_turn(rest, write, between):
        return ""
    raise DataError(
        f"the chat template of {name} ends a reply with {rest!r}, which is plain text for its tokenizer: no engine can "
        "stop there. Add it to the tokenizer as a token (tokenizer.add_tokens), or set model.chat_template=FILE to a "
        "template that ends replies with a token of this tokenizer."
    )


def _written(write: Write, turns: Sequence[tuple[str, str]], ask: bool = False) -> str | None:
    """None if the template refuses such a conversation, with or without a system message."""
    messages = [{"role": role, "content": content} for role, content in turns]
    for before in ([], [{"role": "system", "content": "."}]):
        try:
            return write([*before, *messages], ask)
        except TemplateRefused:
            continue
    return None


def _behind(mark: str, text: str | None, until: str | None = None) -> str | None:
    _, found, after = (text or "").rpartition(mark)
    if until is not None:
        after, was_there, _ = after.partition(until)
        found = found and was_there
    return after if found else None


def _common(pieces: Sequence[str], others: Sequence[str]) -> list[str]:
    return [piece for piece, _ in takewhile(lambda pair: pair[0] == pair[1], zip(pieces, others, strict=False))]


def _cut(pieces: Sequence[str], marks: Marks, *, first: bool) -> str:
    """Up to the first known end; without one, up to the first or last added token; "" without any mark."""
    ends = [place for place, piece in enumerate(pieces) if piece in marks.ends]
    added = [place for place, piece in enumerate(pieces) if piece in marks.added]
    if ends:
        last = ends[0]
    elif added:
        last = added[0] if first else added[-1]
    else:
        return ""
    return "".join(pieces[: last + 1]).lstrip()


def _begins_a_turn(rest: str, write: Write, between: str | None) -> bool:
    """Whether text after a reply belongs to the next turn: to the generation prompt, or to the user's header."""
    asked = _written(write, [("user", FIRST)], ask=True) or ""
    if between is None:
        asks_always = _written(write, [("user", FIRST)]) == asked
        return asks_always and asked.rstrip().endswith(rest)
    opening = asked.partition(FIRST)[0].strip()
    return opening.startswith(rest) and between.strip().endswith(opening)


def content_written(write: Write) -> bool:
    """Whether the template writes what the user says. One that refuses to be tried may."""
    asked = _written(write, [("user", FIRST)], ask=True)
    return asked is None or FIRST in asked


def require_content(write: Write, name: str) -> None:
    """Raises DataError if the template omits the user's text."""
    asked = _written(write, [("user", FIRST)], ask=True)
    if asked is not None and FIRST not in asked:
        raise DataError(
            f"the chat template of {name} writes nothing of what the user says, only {asked[:200]!r}: is it a Jinja "
            "template for messages whose content is text? Set model.chat_template=FILE to one that is."
        )


def named_ends(folder: Path | None, tokenizer: Any) -> dict[int, str]:
    """Token ids that end a reply, and their source: the tokenizer, generation_config.json or config.json.

    Ignores the rest of generation_config.json: with its top-p, top-k, temperature and penalties, samples would not
    follow the learning policy's distribution.

    Raises:
        DataError: an id is not a number, not in the vocabulary, or an ordinary word.
    """
    ends: dict[int, str] = {}
    if tokenizer.eos_token is not None:
        if tokenizer.eos_token_id is None or tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) != str(
            tokenizer.eos_token
        ):
            raise DataError(
                f"the EOS token {tokenizer.eos_token!r} of {tokenizer.name_or_path} is not in its vocabulary. Correct "
                "eos_token in tokenizer_config.json."
            )
        ends[int(tokenizer.eos_token_id)] = "the tokenizer"
    for file in ("generation_config.json", "config.json"):
        for token in _eos_of(folder / file) if folder is not None else ():
            ends.setdefault(token, file)
    for token, source in ends.items():
        _require_end(token, f"{folder}/{source}", tokenizer)
    return dict(sorted(ends.items()))


def _eos_of(file: Path) -> list[int]:
    if not file.exists():
        return []
    try:
        tree = json.loads(read_text(file, str(file), DataError, max_bytes=_MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} can't be read as JSON: {error}. Is it complete?") from error
    if not isinstance(tree, dict):
        raise DataError(f"{file} must hold a JSON object, found {type(tree).__name__}. Is it complete?")
    sections = [tree, tree.get("text_config")]
    found = [section.get("eos_token_id") for section in sections if isinstance(section, dict)]
    named = [value for value in found if value is not None]
    ids = named[0] if named and isinstance(named[0], list) else named[:1]
    wrong = [item for item in ids if not isinstance(item, int) or isinstance(item, bool) or item < 0]
    if wrong:
        raise DataError(f"eos_token_id in {file} must be a token id or a list of them, found {wrong[0]!r}. Correct it.")
    return [int(item) for item in ids]


def _require_end(token: int, source: str, tokenizer: Any) -> None:
    if token in added_tokens(tokenizer) or token in tokenizer.all_special_ids:
        return
    if token >= len(tokenizer):
        raise DataError(
            f"{source} ends replies at token {token}, and the tokenizer has {len(tokenizer)} tokens. Correct "
            "eos_token_id there: is it from another model?"
        )
    if text := tokenizer.decode([token]).strip():
        raise DataError(
            f"{source} ends replies at token {token}, which is the ordinary text {text!r} for its tokenizer. Correct "
            "eos_token_id there: is it from another model?"
        )


def added_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that a tokenizer matches in text first, as a whole: special tokens and other added tokens."""
    return {int(token): text for text, token in tokenizer.get_added_vocab().items()}


def marks_of(ends: Iterable[int], tokenizer: Any) -> Marks:
    added = [text for text in added_tokens(tokenizer).values() if text.strip()]
    return Marks(frozenset(filter(str.strip, map(tokenizer.decode, ([token] for token in ends)))), frozenset(added))
