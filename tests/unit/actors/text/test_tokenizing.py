"""Unusable tokenizers raise errors that name the folder, whatever the library does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.text import tokenizing
from actors.text.conversations import load_chat
from actors.text.tokenizing import encode, load_tokenizer
from orchestrator.errors import DataError
from tests.tiny import CHATML, tiny_tokenizer

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085657\n"


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(tree) or tree))

    return write


def replaced(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def cut(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def without_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0bnot a model")


BROKEN: dict[str, Callable[[Path], None]] = {
    "a model of a newer library": edited("tokenizer.json", lambda tree: tree["model"].update(type="BPE3", vocab3={})),
    "a pre-tokenizer of a newer library": edited(
        "tokenizer.json", lambda tree: tree.update(pre_tokenizer={"type": "Split9000", "pattern": {"Regex": "a"}})
    ),
    "a pattern that does not compile": edited(
        "tokenizer.json",
        lambda tree: tree.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
        ),
    ),
    "a version of a newer library": edited("tokenizer.json", lambda tree: tree.update(version="9.0")),
    "a Git-LFS pointer": replaced("tokenizer.json", LFS),
    "an LFS pointer beside": replaced("tokenizer_config.json", LFS),
    "an empty file": replaced("tokenizer.json", ""),
    "a cut file": cut,
    "a list": replaced("tokenizer_config.json", "[1]"),
    "nested without end": replaced("tokenizer_config.json", "[" * 100_000),
    "no tokenizer.json": without_json,
    "another kind of value": edited("tokenizer_config.json", lambda tree: tree.update(added_tokens_decoder=[1, 2])),
    "a chat template that is a number": edited("tokenizer_config.json", lambda tree: tree.update(chat_template=7)),
    "named templates without names": edited(
        "tokenizer_config.json", lambda tree: tree.update(chat_template=[{"a": 1}])
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_cannot_be_used_is_a_data_error(folder: Path, name: str) -> None:
    BROKEN[name](folder)
    if name.startswith(("a chat", "named")):
        (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=str(folder)):
        load_chat(folder)


@pytest.mark.parametrize("name", ["NewTokenizer", "NewTokenizerFast", "TokenizersBackend"])
def test_a_tokenizer_class_of_a_newer_library_is_read_by_its_file_or_refused(folder: Path, name: str) -> None:
    edited("tokenizer_config.json", lambda tree: tree.update(tokenizer_class=name, invented_field={"a": [1]}))(folder)
    text = "<|im_start|>user\nHi there.<|im_end|>"
    assert encode([text], load_chat(folder).tokenizer) == encode([text], tiny_tokenizer())


def test_templates_in_files_are_read_and_saved_again(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools!" + CHATML)
    chat = load_chat(folder)
    assert (chat.template.text, chat.template.with_tools) == (CHATML, "tools!" + CHATML)
    chat.tokenizer.save_pretrained(tmp_path / "again")
    assert load_chat(tmp_path / "again").fingerprint == chat.fingerprint


def test_named_templates_in_the_config_are_read(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "rag!"}]
    edited("tokenizer_config.json", lambda tree: tree.update(chat_template=named))(folder)
    assert load_chat(folder).template.text == CHATML


def test_mistrals_own_format_does_not_take_the_place_of_the_template(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    (folder / "tekken.json").write_text("{}")
    text = "<|im_start|>user\nHi there.<|im_end|>"
    assert encode([text], load_chat(folder).tokenizer) == encode([text], tiny_tokenizer())


def pattern(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(text), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_pattern_that_searches_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_ENCODE_S", 0.2)
    with pytest.raises(DataError, match=r"can't tokenise a text: it does not end within \d+ s. Correct the patterns"):
        encode([("a" * 19 + "!") * 30], pattern(r"(a+)+$"))


def test_a_panic_of_the_library_is_an_error() -> None:
    with pytest.raises(DataError, match=r"can't tokenise a text: PanicException: .*retry-limit"):
        encode(["a" * 40 + "!"], pattern(r"(?:a|aa)+$"))


def test_a_tokenizer_that_fails_on_any_text_is_not_loaded(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"no usable tokenizer: .*UNK"):
        load_tokenizer(tmp_path)
