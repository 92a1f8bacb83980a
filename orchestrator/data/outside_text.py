"""Makes untrusted text safe to print: hides credentials and escapes control characters."""

from __future__ import annotations

import re

# Secrets in URLs are before the @, or in query parameters with such names.
_USERINFO = re.compile(r"(?<=://)(?:[^/\s@'\"]+|[^\s'\"]*:[^\s'\"]*)@")
_PARAMETER = re.compile(
    r"([?&;][\w.-]*(?:key|token|secret|passw|pwd|sig|credential|auth)[\w.-]*=)[^&\s'\"#]+", re.IGNORECASE
)
_BEARER = re.compile(r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
# Control characters except tab and newline, and characters that reorder text.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Colours as rich writes them, without 8 (conceal), which would hide text.
_COLOUR = re.compile(r"\x1b\[(?:(?!8[;m])\d{1,3};?)*m")


def redacted(text: str) -> str:
    """Replaces credentials in URLs and bearer tokens by ***."""
    for pattern in (_USERINFO, _PARAMETER, _BEARER):
        text = pattern.sub(_covered, text)
    return text


def has_credential(text: str) -> bool:
    """Whether `text` contains a URL with a credential."""
    return bool(_USERINFO.search(text) or ("://" in text and _PARAMETER.search(text)))


def printable(text: str) -> str:
    """Replaces terminal control characters by escapes such as \\x1b; keeps colours."""
    text = text.replace("\r\n", "\n")
    parts = [_STEERING.sub(_escape, part) for part in _COLOUR.split(text)]
    colours = [*_COLOUR.findall(text), ""]
    return "".join(part + colour for part, colour in zip(parts, colours, strict=True))


def _covered(found: re.Match[str]) -> str:
    return f"{found[1]}***" if found.re.groups else "***@"


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")
