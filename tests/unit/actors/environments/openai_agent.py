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
