"""MODEL on the command line (``demo``, a folder, a hub name) → a model and its tokenizer.

Nothing here prints: transformers' progress bars and its report about newly drawn heads are held back, and what matters
of that report is an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from guided_dropout.errors import ModelError
from guided_dropout.identity import backbone_prefix, in_head

DEMO = "demo"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

_LM_CLASSES: dict[str, Any] = {
    "mlm": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
# In order of preference, for classes and model types that stand in several: BERT is a masked LM before a decoder.
_LM_MAPPINGS = {
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "mlm": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
_drawn: WeakKeyDictionary[PreTrainedModel, frozenset[str]] = WeakKeyDictionary()
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"
_SAFE: dict[str, Any] = {"use_safetensors": True}
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what transformers and the hub client write to the terminal; errors still come as exceptions."""
    level, hub_level = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def resolve_model(name: str | Path) -> str:
    """Where to load `name` from: ``"demo"`` → the embedded model's folder; a folder or a hub name → itself.

    Raises:
        ModelError: `name` is a file, or can only be a path and there is no such folder.
    """
    name = str(name)
    if name == DEMO:
        embedded = Path(str(files("guided_dropout") / "demo" / "model"))
        if not embedded.is_dir():
            raise ModelError(f"no folder {embedded}; expected the embedded demo model: install guided-dropout again")
        return str(embedded)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if path.is_file():
        raise ModelError(f"{name} is a file; expected a model's folder, a hub name or {DEMO!r}: give its folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelError(f"no folder {name!r}; expected a model's folder, a hub name or {DEMO!r}: check the path")
    return name


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of model `name`. One that has no padding token pads with its end-of-text token.

    Raises:
        ModelError: nothing there, or neither a padding nor an end-of-text token.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, name)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without a vocabulary
        raise ModelError(
            f"{name} holds no tokenizer; expected tokenizer.json or a vocabulary beside the model: "
            "save the tokenizer into the same folder"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {name} has no padding token and no end-of-text token; expected one of them: "
                "set `pad_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_lm(
    name: str | Path, objective: str = "auto", dtype: torch.dtype = torch.float32, device_map: str | None = None
) -> PreTrainedModel:
    """Load a pretrained language model with its own head, in evaluation mode on the CPU.

    Args:
        name: ``"demo"``, a folder or a hub name.
        objective: ``"mlm"``, ``"causal"``, ``"seq2seq"``, or ``"auto"``: what the checkpoint says it is.
        dtype: the weights' type, whatever it is on disk.
        device_map: spread the model over the devices as transformers does with this map, for instance ``"auto"``.

    Raises:
        ModelError: no such model, no such objective, or weights that do not hold the language-model head, which would
            leave it at random.
    """
    config = _load(AutoConfig.from_pretrained, name)
    objective = _objective(config, objective, str(name))
    placed = _SAFE if device_map is None else {**_SAFE, "device_map": device_map}
    model, info = _load(_LM_CLASSES[objective].from_pretrained, name, dtype=dtype, output_loading_info=True, **placed)
    missing = sorted(info["missing_keys"])
    if missing:
        part = "language-model head" if in_head(model, missing[0]) else "weights"
        raise ModelError(
            f"{name} does not hold the {part} of {type(model).__name__} ({_first(missing)} missing); expected a "
            f"checkpoint pretrained on the {objective} objective with its head: use the original pretrained checkpoint"
        )
    return model.eval()


def load_model(name: str | Path, dtype: torch.dtype = torch.float32, device_map: str | None = None) -> PreTrainedModel:
    """Load the model that the checkpoint says it is, with whatever head it has, in evaluation mode on the CPU.

    Args:
        name: ``"demo"``, a folder or a hub name.
        dtype: the weights' type, whatever it is on disk.
        device_map: as for `load_lm`.

    Raises:
        ModelError: no such model.
    """
    config = _load(AutoConfig.from_pretrained, name)
    architecture = next(iter(config.architectures or []), "")
    loader = getattr(transformers, architecture, AutoModel)
    placed = _SAFE if device_map is None else {**_SAFE, "device_map": device_map}
    return _load(loader.from_pretrained, name, dtype=dtype, **placed).eval()


def load_classifier(
    name: str | Path, num_labels: int, *, head_seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a pretrained backbone with a newly drawn classification head, on the CPU.

    What the checkpoint lacks (the head, BERT's pooler if it was pretrained without) is drawn from the architecture's
    own initial distribution under `head_seed`, whatever the global random state was, which is left as it was.

    Args:
        name: ``"demo"``, a folder or a hub name.
        num_labels: classes; 1 makes it a regression (mean squared error).
        head_seed: seed of the new weights.
        dtype: the weights' type, whatever it is on disk.

    Raises:
        ModelError: no such model, a model type without a classifier, a checkpoint that already has a classification
            head, or one that lacks the backbone.
    """
    problem = "regression" if num_labels == 1 else "single_label_classification"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(head_seed)
        model, info = _load(
            AutoModelForSequenceClassification.from_pretrained,
            name,
            num_labels=num_labels,
            problem_type=problem,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_SAFE,
        )
    _check_classifier(model, info, str(name))
    _drawn[model] = frozenset(info["missing_keys"])
    if model.config.pad_token_id is None:
        end = model.config.eos_token_id
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    return model


def drawn_parameters(model: PreTrainedModel) -> frozenset[str] | None:
    """Names of what the checkpoint lacks, so that `load_classifier` drew it; None for a model loaded otherwise."""
    return _drawn.get(model)


def positions_of(model: PreTrainedModel) -> int | None:
    """The tokens of the longest sample that the model has positions for; None where it has no such limit.

    Of a table of positions that sets some aside (RoBERTa's, which begins after its padding), what is left.
    """
    limit = getattr(model.config, "max_position_embeddings", getattr(model.config, "max_seq_len", None))
    if not isinstance(limit, int) or limit <= 0:
        return None
    named: Any = model.named_modules()
    for name, module in named:
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            aside = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(limit, module.num_embeddings - aside)
    return limit


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse samples longer than the model has positions for.

    Raises:
        ModelError: they are.
    """
    limit = positions_of(model)
    if limit is not None and limit < max_length:
        raise ModelError(
            f"max length {max_length}; {type(model).__name__} has positions for {limit} tokens: "
            f"use --max-length {limit} or less"
        )


def _check_classifier(model: PreTrainedModel, info: dict[str, Any], name: str) -> None:
    missing = info["missing_keys"]
    if not any(in_head(model, key) for key in missing):
        raise ModelError(
            f"{name} already holds a classification head; expected a pretrained model, whose head is drawn by seed: "
            "use the checkpoint that this one was fine-tuned from"
        )
    backbone = {key for key in model.state_dict() if not in_head(model, key)}
    absent = sorted((backbone & missing) | {key for key, *_ in info["mismatched_keys"] if not in_head(model, key)})
    # A checkpoint may lack a part, as BERT's pooler; what lacks some of a part belongs to another configuration.
    present = {_part(model, key) for key in backbone.difference(absent)}
    torn = [key for key in absent if _part(model, key) in present]
    if torn or 2 * len(absent) > len(backbone) or info["mismatched_keys"]:
        prefix = backbone_prefix(model).rstrip(".") or type(model).__name__
        odd = torn or absent or sorted(key for key, *_ in info["mismatched_keys"])
        raise ModelError(
            f"{name} does not hold the weights of {prefix} ({_first(odd)} missing or of another shape); expected a "
            "checkpoint whose config.json and weights belong together: check the folder"
        )


def _part(model: PreTrainedModel, key: str) -> str:
    return key.removeprefix(backbone_prefix(model)).partition(".")[0]


def _objective(config: PreTrainedConfig, objective: str, name: str) -> str:
    if objective not in ("auto", *_LM_CLASSES):
        raise ModelError(f"unknown objective {objective!r}; expected one of auto, {', '.join(_LM_CLASSES)}")
    architectures = config.architectures or []
    mappings = {k: m for k, m in _LM_MAPPINGS.items() if k != "seq2seq" or config.is_encoder_decoder}
    trained = [kind for kind, mapping in mappings.items() if set(architectures) & set(mapping.values())]
    # A bare backbone does not say what it was trained on; its type does.
    fitting = trained or [kind for kind, mapping in mappings.items() if config.model_type in mapping][:1]
    if not fitting or (objective != "auto" and objective not in fitting):
        raise ModelError(
            f"{name} is a {config.model_type} model ({', '.join(architectures) or 'no architecture named'}) for the "
            f"objectives: {', '.join(fitting) or 'none'}; expected {objective.replace('auto', 'a language model')}: "
            "choose another objective or model"
        )
    return fitting[0] if objective == "auto" else objective


def _load(loader: Callable[..., Any], name: str | Path, **options: Any) -> Any:
    source = resolve_model(name)
    try:
        with quiet(), _nothing_sent():
            loaded = loader(source, local_files_only=Path(source).is_dir(), trust_remote_code=False, **options)
    except _LOADING_ERRORS as e:
        where = "the folder" if Path(source).is_dir() else "no such folder, and the hub"
        if "named model.safetensors" in str(e):
            raise ModelError(
                f"cannot load {name}: it has no weights as safetensors; expected those, for pickles may run code: load "
                "it with transformers once, and save it with save_pretrained"
            ) from e
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise ModelError(
            f"cannot load {name} ({where}: {reason}); expected {DEMO!r}, a folder that save_pretrained wrote, or a hub "
            "name: check the name, the folder's files and the connection"
        ) from e
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if isinstance(model, PreTrainedModel):
        model.config.name_or_path = str(name)  # as the user calls it: a path of this machine means nothing elsewhere
    return loaded


@contextlib.contextmanager
def _nothing_sent() -> Iterator[None]:
    """Keep transformers from asking a service on the hub to convert a model that is loaded."""
    before = os.environ.get(_NO_CONVERSION)
    os.environ[_NO_CONVERSION] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_CONVERSION]
        else:
            os.environ[_NO_CONVERSION] = before


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
