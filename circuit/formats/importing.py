"""A foreign transcoder, wherever it lies and whatever its format, as one of ours.

    source --local_folder--> folder --open_foreign--> layers, not read yet --stream--> transcoder/ of a run

Layers are read and written one at a time, so that memory holds one of them, whatever the size of the whole.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ...data.errors import Progress, UserError, check_choice, silent
from ...data.models import LanguageModel
from ..replacement import LocalModel, check_hooks
from .circuit_tracer import CONFIG, open_circuit_tracer
from .folders import Foreign, stream
from .gemma_scope import is_gemma_scope, open_gemma_scope
from .hub import local_folder
from .llamascopium import is_llamascopium, open_llamascopium
from .saelens import open_saelens
from .sparsify import open_sparsify

PROGRAMS = {
    "circuit-tracer": open_circuit_tracer,
    "llamascopium": open_llamascopium,
    "saelens": open_saelens,
    "sparsify": open_sparsify,
    "gemma-scope": open_gemma_scope,
}
SAMPLE = (
    "The history of the region goes back to the eleventh century, when the first churches were built along the river.",
    "In 1995 the company sold about three hundred thousand cars, more than in any year before.",
    "def add(a, b):\n    return a + b\n\nfor name in sorted(names):\n    print(name, len(name))\n",
    "She opened the letter, read it twice, and went out into the garden without a word to anybody.",
    "Water boils at one hundred degrees; ice melts at zero. Both depend on the pressure of the air.",
    "The committee will meet on Tuesday to discuss the new rules for schools, hospitals and public transport.",
)
"""A few hundred tokens of ordinary text: enough to see whether a transcoder fits its model."""


def open_foreign(source: str | Path, program: str = "auto", l0: int | None = None) -> Foreign:
    """The transcoder that a folder or a place on the hub holds; `auto` tells the format by what is there."""
    check_choice("format", program, ["auto", *PROGRAMS])
    folder = local_folder(source)
    if program == "auto":
        program = _told(folder)
    return open_gemma_scope(folder, l0) if program == "gemma-scope" else PROGRAMS[program](folder)


def _told(folder: Path) -> str:
    if (folder / CONFIG).is_file():
        return "circuit-tracer"
    if is_gemma_scope(folder):
        return "gemma-scope"
    if is_llamascopium(folder):
        return "llamascopium"
    if any(folder.glob("*/sae.safetensors")):
        return "sparsify"
    if (folder / "cfg.json").is_file() or any(folder.glob("*/cfg.json")):
        return "saelens"
    raise UserError(f"{folder} is in none of the formats that are read ({', '.join(PROGRAMS)})")


def import_transcoder(
    foreign: Foreign, folder: str | Path, lm: LanguageModel | None = None, progress: Progress = silent
) -> Path:
    """Stream it into `folder`; a model says whether it fits its places, and folds a norm's gain in where it must."""
    if lm is not None:
        _check_shape(foreign, lm)
        check_hooks(lm, foreign.hooks, sorted(foreign.layers))
    stream(foreign, Path(folder), lm, progress)
    return Path(folder)


def _check_shape(foreign: Foreign, lm: LanguageModel) -> None:
    width = next(iter(foreign.layers.values())).shapes["W_enc"][1]
    if width != lm.d_model or max(foreign.layers) >= lm.n_layers:
        raise UserError(
            f"the transcoder is for a model of width {width} with {max(foreign.layers) + 1} layers or more; "
            f"{lm.name or 'this model'} has width {lm.d_model} and {lm.n_layers} layers"
        )


def cached(source: str | Path, cache: Path, lm: LanguageModel) -> Path:
    """The transcoder of a source in a cache folder, imported when it is not there yet."""
    key = hashlib.sha256(f"{local_folder(source).resolve()} {lm.fingerprint}".encode()).hexdigest()[:16]
    folder = cache / key
    if not (folder / "transcoder.json").is_file():
        import_transcoder(open_foreign(source), folder, lm)
    return folder


@torch.no_grad()
def measured_nmse(model: LocalModel, texts: Sequence[str | Sequence[int]] = SAMPLE) -> list[float]:
    """NMSE of each covered layer on a few hundred tokens: above 1, a transcoder says less than nothing at all would."""
    if model.lm.tokenizer is None and texts is SAMPLE:
        texts = [list(range(model.lm.d_vocab))[: model.lm.context_length]]
    missed = torch.zeros(model.transcoder.n_layers, dtype=torch.float64)
    total = torch.zeros_like(missed)
    for text in texts:
        run = model.clean(model.lm.tokenize(text)[None])
        for l, (layer, error) in enumerate(zip(model.transcoder.layers, model.errors(run))):
            missed[l] += float(error[~run.masked].square().sum())
            total[l] += float(run.mlp_out[layer][~run.masked].square().sum())
    return (missed / total.clamp_min(1e-30)).tolist()
