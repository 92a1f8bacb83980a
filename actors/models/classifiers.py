"""Sequence classifiers of architectures for which transformers has none, such as Cohere or OLMoE."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

_SUFFIX = "PreTrainedModel"


def provide_classifier(config: Any) -> None:
    """Lets AutoModelForSequenceClassification load this kind of config, with transformers' own classifier over any
    backbone. Only this program can load such a reward model again.

    Kinds that transformers does not know, of code in a model's folder, are left alone.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_MAPPING:
        return
    bases = MODEL_MAPPING[kind].__mro__[1:]
    base = next(found for found in bases if issubclass(found, PreTrainedModel) and found.__name__.endswith(_SUFFIX))
    if base is PreTrainedModel:
        return
    name = f"{base.__name__.removesuffix(_SUFFIX)}ForSequenceClassification"
    classifier = type(name, (GenericForSequenceClassification, base), {"__module__": __name__})
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)  # without it, nothing happens
