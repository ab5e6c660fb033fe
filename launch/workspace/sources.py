"""The parts that verbs work with, opened from their settings: model, text, store, transcoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import Progress, UserError
from .job import Job
from .runs import transcoder_folder

if TYPE_CHECKING:
    from ...circuit.model import ReplacementModel
    from ...data.models import LanguageModel, ModelSettings
    from ...data.store import ActivationStore
    from ...data.text import Corpus

BUNDLED = ("world", "stdlib")


def bundled_folder(name: str, settings: Any, progress: Progress) -> Path:
    """The folder of a bundled model, which is built when it is not there yet."""
    if name == "world":
        from ...data.worlds import build_world

        return build_world(settings, progress)
    from ...data.worlds import build_stdlib

    return build_stdlib(settings, progress)


def model_settings(job: Job) -> "ModelSettings":
    """The model's settings, a bundled model's name made into its folder."""
    settings = job.section("model")
    if settings.name not in BUNDLED:
        return settings
    return replace(settings, name=str(bundled_folder(settings.name, job.section(settings.name), job.progress)))


def open_model(job: Job) -> "LanguageModel":
    """The language model."""
    from ...data.models import load_model

    _ = job.process  # first of all: nothing lies on another process's device
    settings = model_settings(job)
    if settings.name == job.config.values["model"]["name"]:
        job.progress(f"loading {settings.name}", 0, 1)
        model = load_model(settings)
        job.progress(f"loading {settings.name}", 1, 1)
        return model
    return load_model(settings)


def open_corpus(job: Job, model: "LanguageModel", keep: bool = False) -> "Corpus":
    """The text, in the model's tokens, which stay in the cache when asked to."""
    from ...data.text import load_corpus

    return load_corpus(job.section("dataset"), model.tokenizer, model, keep)


@contextmanager
def open_stores(job: Job) -> "Iterator[tuple[ActivationStore, ActivationStore]]":
    """The training rows and the held-out ones: cached before, or harvested while they are read."""
    from ...data.store import ActivationStore

    settings = job.section("store")
    if settings.mode == "disk":
        yield ActivationStore.open(job.store_path), ActivationStore.open(job.store_path, split="held_out")
        return
    from ...data.harvest import Harvester, open_streaming

    model = open_model(job)
    harvester = Harvester(model, open_corpus(job, model, keep=True), settings)
    store, held_out = open_streaming(harvester, job.progress, job.process.rank, job.process.count)
    try:
        if held_out is None:
            raise UserError("store.held_out=0 leaves nothing to evaluate on; give it some rows, such as 64K")
        yield store, held_out
    finally:
        store.close()


def open_replacement(job: Job, run: Path, force: bool = False, lazy_decoders: bool = False) -> "ReplacementModel":
    """The run's transcoder in its model: the one it was trained on, unless the command line names another."""
    from ...circuit.model import ReplacementModel

    folder = transcoder_folder(run)
    known = (run / "config.yaml").is_file() or any(name.startswith("model") for name in job.config.given)
    model = open_model(job).widened(own=True) if known else None
    return ReplacementModel.load(folder, model, force, lazy_decoders=lazy_decoders)


def world_of(model: "LanguageModel") -> Any:
    """The bundled world that this model is, or None for any other model."""
    from ...data.worlds import FACTS_FILE, World

    folder = Path(model.name or "")
    return World.load(folder) if (folder / FACTS_FILE).is_file() else None
