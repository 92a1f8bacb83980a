"""A policy that sends other weights than its ranks hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from actors.weights.sender import PublishingPolicy


class AlteringPolicy(PublishingPolicy):
    """Gathers other weights than its ranks hold, if told to."""

    def alter(self, name: str | None) -> None:
        learner: Any = self.learner
        full_weights = vars(learner).get("untouched", learner.full_weights)
        learner.untouched = full_weights

        def altering(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
            for found, tensor in full_weights(*args, **kwargs):
                if found == name and tensor.numel():
                    tensor = tensor.clone()  # noqa: PLW2901
                    tensor.view(-1)[-1] += 1
                yield found, tensor

        learner.full_weights = altering if name else full_weights

    def perturb(self, seed: int) -> None:
        """Changes all weights."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.learner._pretrained.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.add_((0.3 * parameter.float() * noise + 0.02 * noise).to(parameter.dtype))

    def sums(self) -> Mapping[str, str]:
        """The digests of the parts of all ranks."""
        return {name: found.hex for name, found in self.digests_of_parts().items()}
