"""An agent that is written for OpenAI's client. The contained process imports this module."""

from __future__ import annotations

from typing import Any

from openai import OpenAI

from actors.environments.contract import Task


def talk(prompt: Task, base_url: str) -> float:
    client = OpenAI(base_url=base_url)
    (model,) = client.models.list().data
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt.text}]
    for _ in range(2):
        answer = client.chat.completions.create(model=model.id, messages=messages, temperature=0.3, max_tokens=99)
        messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "Go on."}]
    return float(answer.usage.completion_tokens)


def stream(prompt: Task, base_url: str) -> dict[str, float]:
    """The text and the called tool, as parts of the reward."""
    weather: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    found: list[str] = []
    messages: Any = [{"role": "user", "content": prompt.text}]
    for chunk in OpenAI(base_url=base_url).chat.completions.create(
        model="policy", messages=messages, tools=[weather], stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            found += [choice.delta.content] if choice.delta.content else []
            found += [call.function.name or "" for call in choice.delta.tool_calls or [] if call.function]
    assert chunk.usage is not None and chunk.usage.completion_tokens > 0
    return dict.fromkeys(found, 1.0)
