"""`crosslace train`: a transcoder from a store."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import UserError
from ..terminal import Closing, table
from ..workspace import Job, model_settings, open_corpus, open_model, open_stores, provenance, runs, tracking

if TYPE_CHECKING:
    from ...data.store import ActivationStore
    from ...train.parallel import Collectives
    from ...train.settings import TrainerSettings
    from ...train.start import Neurons
    from ...train.trainer import Trainer, TrainResult
    from ...train.transcoder import Transcoder

INTERRUPTED = 75
"""The exit code of a run that was asked to stop and saved: not finished, to be gone on with (EX_TEMPFAIL)."""
TRACKERS = ("wandb", "tensorboard")
SAVED = ("init", "model", "dataset", "world", "stdlib", "store", "transcoder", "trainer", "parallel", *TRACKERS)


def run(job: Job) -> Closing:
    """Train a new run, or go on with one that was cut off; or say what that would take."""
    if job.top.plan:
        from .plan_run import run as run_plan

        return run_plan(job)
    folder = Path(job.top.run)
    try:
        with terminable():
            result = fit(job, folder)
    except _Terminated:
        return Closing("stopped between steps: run the same command again to go on", code=INTERRUPTED)
    if result is None:
        return Closing(f"{folder} is trained already", next=next_commands(folder))
    if result.status != "finished":
        return Closing(result.message, code=130 if result.by_person else INTERRUPTED)
    overall = result.evaluation["overall"]
    return Closing(
        "trained",
        notes=worst_rows(job, result.evaluation),
        tables=[
            table("held-out", ("", "value"), [(name, value) for name, value in overall.items()]),
            *([table("speed", ("", "value"), list(result.speed.items()))] if result.speed else []),
        ],
        wrote=[
            (str(folder / "transcoder"), "the transcoder, on the model's own activations"),
            (str(folder / "metrics.jsonl"), "one line a logged step"),
        ],
        next=next_commands(folder),
    )


def worst_rows(job: Job, evaluation: dict[str, Any]) -> list[str]:
    """The tokens of layers in which a few rows have more than half of the error."""
    from ...train.run import named_tokens

    layers = job.section("transcoder").layers or list(range(len(evaluation["layers"])))
    return [
        f"layer {layers[l]}: more than half of the held-out error is in {named_tokens([*map(names(job), tokens)])}"
        for l, tokens in evaluation.get("worst_tokens", {}).items()
    ]


def names(job: Job) -> "Callable[[int], str]":
    """Token ids to words, where the store's model is at hand."""
    from ...data.models import token_names

    return token_names(lambda: model_settings(job))


def behaviour(job: Job) -> "Callable[[Transcoder], dict[str, float]] | None":
    """What the language model does with its MLPs replaced, on held-out text: measured at each evaluation."""
    tokens = job.section("trainer").behaviour_tokens
    if not tokens:
        return None
    from ...circuit.judge import LEAST_TOKENS, EvalSettings, evaluate
    from ...circuit.model import ReplacementModel
    from ...train.parallel import SINGLE
    from .evaluate import evaluation_text

    asked = EvalSettings(
        tokens=tokens, calibration_tokens=LEAST_TOKENS, layers=False, controls=False, prompts=0, pairs=0
    )
    model = open_model(job).widened(own=True)
    corpus = open_corpus(job, model)

    def measured(transcoder: "Transcoder") -> dict[str, float]:
        replaced = ReplacementModel(model, transcoder)
        found = evaluate(replaced, evaluation_text(replaced, corpus, asked, SINGLE), asked)["behaviour"]
        return {name: found[name] for name in ("kl", "ce_recovered", "top1")}

    return measured


def next_commands(folder: Path) -> list[str]:
    """What one does with a trained run."""
    return [
        f"crosslace eval run={folder}",
        f"crosslace features run={folder}",
        f'crosslace trace run={folder} prompt="..."',
    ]


class _Terminated(BaseException):
    """SIGTERM outside the steps."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM before the first step or after the last, when there is nothing to save, is an interruption too."""

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fit(job: Job, folder: Path) -> "TrainResult | None":
    """Train in `folder` with the job's settings; None where that was done before."""
    from ...train.parallel import processes

    device = job.process.device
    with (
        open_stores(job) as stores,
        processes(job.section("parallel"), device, exchanges(job, stores[0], device.type)) as comm,
        prepared(job, folder, stores, comm) as trainer,
    ):
        return None if trainer is None else trainer.run()


@contextmanager
def prepared(
    job: Job, folder: Path, stores: "tuple[ActivationStore, ActivationStore]", comm: "Collectives"
) -> "Iterator[Trainer | None]":
    """A training that has not begun, in a folder that is its own meanwhile; None where it was done before."""
    from ...train.trainer import Trainer, room_for

    settings, (store, held_out) = run_settings(job), stores
    fresh = comm.is_main and not runs.claim(folder, settings)
    with runs.locked(folder) if comm.is_main else nullcontext():
        comm.barrier()
        if trained_steps(folder) >= job.section("trainer").steps:
            yield None
            return
        try:
            with room_for(folder):
                yield Trainer(
                    trainer_settings(job),
                    job.section("transcoder"),
                    store,
                    held_out,
                    folder,
                    comm=comm,
                    device=job.process.device,
                    trackers=trackers_of(job, folder, settings) if comm.is_main else [],
                    progress=job.progress,
                    token_name=names(job),
                    behaviour=behaviour(job) if comm.is_main else None,
                    meta=masked(store) | {"made_with": provenance(["train", *job.words])},
                    **beginning(job, store),
                )
        except BaseException:
            if fresh:
                runs.release(folder)
            raise


def trackers_of(job: Job, folder: Path, settings: dict[str, Any]) -> list[Any]:
    """What listens to the training, by the settings."""
    return tracking.trackers(job.section("wandb"), job.section("tensorboard"), folder, settings)


def trained_steps(folder: Path) -> int:
    """After how many steps a run was finished; 0 where it was not."""
    description = folder / "transcoder" / "transcoder.json"
    if not description.is_file():
        return 0
    return runs.read_json(description)["meta"].get("trained_as", {}).get("steps", sys.maxsize)


def trainer_settings(job: Job) -> "TrainerSettings":
    """The trainer's, with the precision that `auto` stands for."""
    settings = job.section("trainer")
    return replace(settings, precision=job.process.precision) if settings.precision == "auto" else settings


def exchanges(job: Job, store: "ActivationStore", device: str) -> dict[str, dict[str, float]]:
    """What the processes may exchange: the bytes that one hands in, by collective."""
    from ...train.planning import Shape, choices

    transcoder = job.section("transcoder")
    layers = transcoder.layers or store.layers
    shape = Shape(len(layers), store.d_model, len(store), store.dtype.itemsize)
    machine = replace(job.section("machine"), device="cuda" if device == "cuda" else "cpu")
    found = choices(shape, transcoder, job.section("trainer"), job.section("parallel"), machine)
    return {name: {what: flow.handed for what, flow in flows.items()} for name, flows in found.items()}


def beginning(job: Job, store: "ActivationStore") -> dict[str, Any]:
    """What a training begins with, as keywords of the trainer: the MLPs' neurons, or a transcoder of the same model."""
    from ...train.transcoder import Transcoder

    init = job.config.values.get("init", "auto")
    if init == "random":
        return {}
    if init in ("auto", "mlp"):
        return {"neurons": neurons(job, store, wanted=init == "mlp")}
    if not init or not Path(init).is_dir():
        raise UserError(f"init={init} is neither mlp, random nor the folder of a run; there is no such folder")
    source = Transcoder.load(runs.transcoder_folder(Path(init)))
    made_of, needed = (meta.get("model", {}).get("fingerprint") for meta in (source.meta, store.attributes))
    if made_of != needed:
        raise UserError(f"init={init} was trained on model {made_of}, and the store is of {needed}; take another")
    return {"init": source}


def neurons(job: Job, store: "ActivationStore", wanted: bool) -> "Iterator[Neurons]":
    """The language model's own, which is opened only when the first is asked for: a run that goes on needs none.
    None at all where its MLPs are no lists of neurons, unless they are `wanted`: then it is refused."""
    from ...train.start import has_neurons, model_neurons
    from ...train.transcoder import read_chosen

    shape = read_chosen(job.section("transcoder"), store, say=False)
    try:
        model = open_model(job)
    except UserError as error:
        raise UserError(f"{error} (it is needed for its neurons; init=random begins without it)") from error
    if wanted or has_neurons(model, store, shape.layers):
        yield from model_neurons(model, store, shape.layers, shape.read)


def run_settings(job: Job) -> dict[str, Any]:
    """The settings that a run keeps: model and text are those of its store."""
    values = job.config.values
    saved = runs.saved_settings(Path(job.store_path))
    for name, model in (("model", "language model"), ("dataset", "text")):
        old, new = saved.get(name, {}).get("name"), values[name]["name"]
        if name in job.config.given and old is not None and old != new:
            raise UserError(
                f"{job.store_path} holds activations of the {model} {old}, not of {new}; cache another store"
            )
    job.config.base_on({name: part for name, part in saved.items() if name not in job.config.given})
    return {"seed": values["seed"], **{name: values[name] for name in SAVED if name in values}}


def masked(store: Any) -> dict[str, Any]:
    """What the transcoder must know of the positions that its store leaves out."""
    return {"masked": store.attributes["masked"]} if "masked" in store.attributes else {}
