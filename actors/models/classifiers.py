"""Sequence classifiers of architectures for which transformers has none, such as Cohere, OLMoE or Mamba."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from actors.models.reward_heads import num_heads

_SUFFIX = "PreTrainedModel"


class _Classifier:
    """Scores a text by a linear head on the state of its last token that is not padding."""

    config: Any
    base_model_prefix: str

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # of the architecture's PreTrainedModel
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor, **options: Any) -> SequenceClassifierOutput:
        states_BTD = getattr(self, self.base_model_prefix)(input_ids, **options).last_hidden_state
        positions_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        last_B = (positions_T * (input_ids != self.config.pad_token_id)).argmax(-1)
        rows_B = torch.arange(len(input_ids), device=input_ids.device)
        return SequenceClassifierOutput(logits=self.score(states_BTD[rows_B, last_B]))


def as_scorer(config: Any) -> None:
    """Makes a config that of a model with a label per reward head, which AutoModelForSequenceClassification can make.

    Only this program loads models of kinds for which transformers has no classifier. Kinds that transformers does not
    know, of code in a model's folder, are left alone.

    Raises:
        DataError: see num_heads.
    """
    config.num_labels = num_heads(config)
    _provide_classifier(type(config))


def _provide_classifier(kind: Any) -> None:
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_MAPPING:
        return
    bases = MODEL_MAPPING[kind].__mro__[1:]
    base = next(found for found in bases if issubclass(found, PreTrainedModel) and found.__name__.endswith(_SUFFIX))
    if base is PreTrainedModel:
        return
    name = f"{base.__name__.removesuffix(_SUFFIX)}ForSequenceClassification"
    classifier = type(name, (_Classifier, base), {"__module__": __name__})
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)  # without it, nothing happens
