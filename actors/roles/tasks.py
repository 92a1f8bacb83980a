"""Measures a model on tasks of lm-eval (Gao 2024, EleutherAI's evaluation harness)."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from transformers import GenerationConfig

from actors.learning.distributed import Group
from actors.models.model import load_causal, resolve_model, torch_dtype
from actors.text.tokenizing import load_tokenizer
from orchestrator.config.sections import ModelConfig
from orchestrator.errors import DataError

_ENDINGS = (".yaml", ".yml")
_LOOK_S = 0.2
_TOKENS_PER_ROW = 512  # of a batch


def found_tasks(names: Sequence[str]) -> list[Any]:
    """The tasks as lm-eval takes them: names that it knows, and the contents of files.

    Raises:
        DataError: the package is missing, or it knows no such task.
    """
    _library("lm_eval")
    known = _library("lm_eval.tasks").TaskManager()
    found: list[Any] = []
    for name in names:
        if not name.endswith(_ENDINGS):
            if not known.match_tasks([name]):
                raise DataError(f"evaluate.tasks: lm-eval knows no task {name!r}; `lm-eval ls tasks` lists them.")
            found.append(name)
            continue
        try:
            # As its own command line does; the package has no public function for it.
            found.append(_library("lm_eval.tasks._yaml_loader").load_yaml(Path(name), resolve_func=True))
        except Exception as error:  # it runs code that the file names
            raise DataError(f"evaluate.tasks: {name} can't be read ({type(error).__name__}: {error}).") from error
    return found


class TaskWorker:
    """One model, measured in a thread, so that a driver can see the progress."""

    def __init__(self, model: ModelConfig, cache: Path, micro_batch_tokens: int, group: Group) -> None:
        torch.set_num_threads(group.threads)
        folder = resolve_model(model.path, cache)
        language_model = load_causal(
            folder, torch_dtype(model.compute_dtype), trust_remote_code=model.trust_remote_code
        ).to(group.device)
        # Tasks say how to sample. What the model's own file asks for, such as a repetition penalty, is not applied.
        ends = language_model.generation_config.eos_token_id
        language_model.generation_config = GenerationConfig(eos_token_id=ends)
        self._num_batches = 0
        self._outcome: Mapping[str, float] | DataError | None = None
        self._model = self._counting(
            pretrained=language_model,
            tokenizer=load_tokenizer(folder, trust_remote_code=model.trust_remote_code),
            batch_size=max(micro_batch_tokens // _TOKENS_PER_ROW, 1),
        )

    def start(self, names: Sequence[str]) -> None:
        tasks = found_tasks(names)
        threading.Thread(target=self._run, args=(tasks,), daemon=True).start()

    def wait(self, seconds: float) -> tuple[int, Mapping[str, float] | None]:
        """Waits for the end. Returns the number of batches so far, and the metrics as TASK/METRIC, or None.

        Raises:
            DataError: what lm-eval raised.
        """
        until = monotonic() + seconds
        while self._outcome is None and monotonic() < until:
            sleep(_LOOK_S)
        if isinstance(self._outcome, DataError):
            raise self._outcome
        return self._num_batches, self._outcome

    def _run(self, tasks: Sequence[Any]) -> None:
        try:
            results = _library("lm_eval").simple_evaluate(self._model, tasks=list(tasks), log_samples=False)
            self._outcome = metrics_of(results)
        except Exception as error:  # noqa: BLE001  of any library that a task uses
            self._outcome = DataError(f"evaluate.tasks: lm-eval failed: {type(error).__name__}: {error}")

    def _counting(self, **arguments: Any) -> Any:
        """lm-eval's model over ours, which counts its batches here."""
        worker = self

        class Counting(_library("lm_eval.models.huggingface").HFLM):  # type: ignore[misc]
            def _model_call(self, *inputs: Any, **more: Any) -> Any:
                worker._num_batches += 1
                return super()._model_call(*inputs, **more)

            def _model_generate(self, *inputs: Any, **more: Any) -> Any:
                worker._num_batches += 1
                return super()._model_generate(*inputs, **more)

        return Counting(**arguments)


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of lm-eval's results, as TASK/METRIC or TASK/METRIC/FILTER."""
    return {
        f"{task}/{name.removesuffix(',none').replace(',', '/')}": float(value)
        for task, found in results["results"].items()
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name
    }


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"evaluate.tasks needs the package lm-eval ({error}): pip install 'rlhf-orchestrator[tasks]', or set "
            "evaluate.tasks=[]."
        ) from error
