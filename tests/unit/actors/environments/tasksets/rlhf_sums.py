"""A taskset of the package verifiers with a harness of its own, which talks for two turns in this process."""

from __future__ import annotations

import httpx
import verifiers.v1 as vf

__all__ = ["Sums", "TwoTurns"]


class Sum(vf.Task):
    @vf.reward(weight=0.5)
    async def length(self, trace: vf.Trace) -> float:
        return float(trace.info["length"])

    @vf.reward
    async def is_second(self, trace: vf.Trace) -> float:
        return float(self.data.idx == 1)


class Sums(vf.Taskset[Sum]):
    def load(self):
        return [Sum(vf.TaskData(prompt=f"What is {number} + 1?")) for number in range(3)]


class TwoTurns(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, tool_interception_url=None):
        messages = [{"role": "user", "content": data.prompt}]
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {secret}"}, timeout=None) as client:
            for _ in range(2):
                body = {"model": ctx.model, "messages": messages}
                answer = await client.post(f"{endpoint}/chat/completions", json=body)
                answer.raise_for_status()
                text = answer.json()["choices"][0]["message"]["content"]
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
        trace.info["length"] = len(text)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
