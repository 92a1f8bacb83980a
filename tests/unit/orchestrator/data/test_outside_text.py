"""Credentials are hidden and control characters escaped in any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.outside_text import has_credential, printable, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:80/x", "http://***@host:80/x"),
        ("s3://AKIA:se/cr+et@bucket/prefix?region=eu", "s3://***@bucket/prefix?region=eu"),
        ("https://token@host/x and http://u:p@h", "https://***@host/x and http://***@h"),
        ("https://host/x?api_key=abc&n=1", "https://host/x?api_key=***&n=1"),
        ("https://host/?X-Amz-Signature=abc#top", "https://host/?X-Amz-Signature=***#top"),
        ("https://h/?n=1&access_token=abc', 'x'", "https://h/?n=1&access_token=***', 'x'"),
        ('{"error": "http://u:p@h failed"}', '{"error": "http://***@h failed"}'),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
    ],
)
def test_credentials_are_covered(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:80/x",
        "mail a@b.org",
        "https://host/path, a@b.org",
        "s3://bucket/prefix?region=eu",
        "/a/b?key",
        "a:b@c",
    ],
)
def test_what_holds_no_credential_is_left_alone(text: str) -> None:
    assert redacted(text) == text
    assert not has_credential(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x1b[2J\x1b[1;1H", "\\x1b[2J\\x1b[1;1H"),
        ("\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
        ("\x1b[8mhidden\x1b[0;8m", "\\x1b[8mhidden\\x1b[0;8m"),
        ("over\rwritten\r\n", "over\\rwritten\n"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("\x9b31m \x00 \x7f \ud800", "\\x9b31m \\x00 \\x7f \\ud800"),
        ("tab\tnewline\nümlaut 漢 עברית", "tab\tnewline\nümlaut 漢 עברית"),
    ],
)
def test_no_character_steers_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(alphabet=st.characters(codec=None), max_size=60))
def test_what_is_shown_can_be_encoded_and_is_stable(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert printable(shown) == shown
