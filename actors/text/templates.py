"""Renders chat templates of models within limits, because a template is untrusted code."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

from actors.text.template_process import CPU_SECONDS, MEMORY_BYTES
from orchestrator.data.inputs import at_home, read_text
from orchestrator.errors import DataError

_ANSWER_S = 120.0  # the process ends itself after CPU_SECONDS; this is for machines that give it no CPU time
_WAY_OUT = "Correct the template, or set model.chat_template=FILE (reward model: chat_template.jinja in its folder)."


def read_template(path: Path, key: str = "model.chat_template") -> str:
    """The text of the template that a key names. Raises DataError if it can't be read."""
    return read_text(at_home(path, key, DataError), f"{key}={path}", DataError)


def render_text(template: str, variables: Mapping[str, Any], name: str) -> str:
    """A template that is not a chat template. Raises DataError, which gives its `name`, if it fails."""
    answer = _PROCESS.ask({"template": template, "today": date.min.isoformat(), "variables": variables})
    if "text" not in answer:
        raise DataError(f"{name} fails: {answer['error']}.")
    return str(answer["text"])


class TemplateRefused(DataError):
    """The template refuses this conversation with raise_exception."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and its inputs other than the conversation.

    Args:
        name: its source, for messages.
        text: Jinja source; `with_tools` is used instead where a conversation has tools (transformers' "tool_use").
        variables: special tokens by name (bos_token, eos_token, ...).
        today: the date that `strftime_now` returns.
        in_parts: the template takes the content of a message as a list of parts, as those of vision models do.
    """

    name: str
    text: str
    with_tools: str | None
    variables: Mapping[str, str]
    today: date
    in_parts: bool = False

    @property
    def reads_date(self) -> bool:
        return any("strftime_now" in text for text in (self.text, self.with_tools or ""))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template` writes it.

        Raises:
            TemplateRefused: the template refuses the conversation.
            DataError: the template is broken, never ends, or asks for too much memory.
        """
        tools = list(tools) if tools else None
        variables = {
            **self.variables,
            "messages": [_in_parts(turn) for turn in messages] if self.in_parts else list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self.with_tools if tools and self.with_tools is not None else self.text
        answer = _PROCESS.ask({"template": template, "today": self.today.isoformat(), "variables": variables})
        if "text" in answer:
            return str(answer["text"])
        roles = ", ".join(str(message["role"]) for message in messages)
        if answer["refused"]:
            raise TemplateRefused(
                f"the chat template of {self.name} refuses a conversation of {roles}: {answer['error']}. Change the "
                "conversation, unset model.system_prompt, or set model.chat_template=FILE."
            )
        raise DataError(
            f"the chat template of {self.name} fails on a conversation of {roles}: {answer['error']}. {_WAY_OUT}"
        )


def _in_parts(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


class _TemplateProcess:
    """The process that renders, started on first use and again after a template has ended it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        line = json.dumps(request).encode("ascii") + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            answer = b""
            try:
                process.stdin.write(line)
                process.stdin.flush()
                if select.select([process.stdout], [], [], _ANSWER_S)[0]:
                    answer = process.stdout.readline()
            except BrokenPipeError:
                pass
            if answer.endswith(b"\n"):
                found: dict[str, Any] = json.loads(answer)
                return found
            return {"error": self._why_gone(process), "refused": False}

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "actors.text.template_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**_LIBRARIES, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for the command, whose end closes the pipe
            )
        return self._process

    def _why_gone(self, process: subprocess.Popen[bytes]) -> str:
        process.kill()
        self.close()
        if process.returncode == -signal.SIGPROF:
            return f"it does not end within {CPU_SECONDS:g} s"
        return f"its process ended with code {process.returncode} (limits: {CPU_SECONDS:g} s, {MEMORY_BYTES >> 20} MiB)"


# The process needs none of the environment's secrets.
_LIBRARIES = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
_PROCESS = _TemplateProcess()
