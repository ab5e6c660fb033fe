"""`crosslace eval`: measure a transcoder on held-out text, and write the figures and a page about them."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...data.errors import UserError
from ..terminal import Closing, table
from ..workspace import Job, open_corpus, open_replacement, runs, world_of

if TYPE_CHECKING:
    from ...circuit.judge import EvalSettings, EvalText, PromptSet, TextBatch
    from ...circuit.model import ReplacementModel
    from ...data.text import Corpus, TokenSequence
    from ...train.parallel import Collectives

SHOWN = ("nmse", "l0", "dead", "top1", "kl", "ce_recovered")
"""The figures that stand for a run."""

SETS = (("stdlib", "stdlib"), ("smollm2", "questions"))
"""The prompt set of a model whose folder begins so."""


def run(job: Job) -> Closing:
    """Evaluate a run: on several processes, each measures its share of the text and of the prompts."""
    from ...train.parallel import ParallelSettings, processes

    folder = Path(job.top.run)
    runs.writable(folder)
    runs.refuse_other(folder / "eval.json", settings_of(folder), asked(job), job.top.overwrite)
    _ = job.process  # first of all: nothing lies on another process's device
    model = open_replacement(job, folder)
    corpus = open_corpus(job, model.lm)
    with processes(ParallelSettings.as_started(), model.lm.device) as comm:
        result = evaluated(model, corpus, job.section("eval"), job.progress, comm)
    result["made_with"]["settings"] = asked(job)
    if job.is_main:
        write(folder, result)
    wrote = [("eval.json", "every figure"), ("report.html", "a page about the run"), ("plots", "its pictures as PNG")]
    return Closing(
        "evaluated",
        tables=[overall_table({folder.name: result}), layers_table(result)],
        notes=result["verdicts"],
        wrote=[(str(folder / name), what) for name, what in wrote],
        next=[f"crosslace features run={folder}", f'crosslace trace run={folder} prompt="..."'],
    )


def asked(job: Job) -> dict[str, Any]:
    """The settings on which the figures depend."""
    return {name: job.config.values[name] for name in ("eval", "dataset", "model")}


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the evaluation that the folder holds, if it says them."""
    path = folder / "eval.json"
    return runs.read_json(path).get("made_with", {}).get("settings") if path.is_file() else None


def evaluated(
    model: "ReplacementModel",
    corpus: "Corpus",
    settings: "EvalSettings",
    progress: Any,
    comm: "Collectives | None" = None,
) -> dict[str, Any]:
    """The figures of `eval.json`, with all that two results must share to be compared."""
    import torch

    from ...circuit.judge import evaluate
    from ...train.parallel import SINGLE

    comm = comm or SINGLE
    began = time.monotonic()
    text = evaluation_text(model, corpus, settings, comm)
    result = evaluate(model, text, settings, comm, progress)
    transcoder = model.transcoder
    trained_as = transcoder.meta.get("trained_as", {}).get("activation", transcoder.settings.activation)
    result["made_with"] = {
        "crosslace": __version__,
        "torch": torch.__version__,
        "kind": f"{transcoder.kind} {trained_as}",
        "transcoder": asdict(transcoder.settings),
        "model": model.lm.fingerprint,
        "model_name": model.lm.name,
        "dataset": corpus.fingerprint,
        "store": transcoder.meta.get("store"),
        "tokens": f"{settings.tokens} tokens asked for, {text.sequences} sequences",
        "prompts": text.prompts.label if text.prompts else None,
        "seed": settings.seed,
        "seconds": round(time.monotonic() - began, 1),
    }
    return result


def write(folder: Path, result: dict[str, Any]) -> None:
    """`eval.json`, then the page."""
    from ..pages import write_report

    runs.write_json(folder / "eval.json", result)
    write_report([folder], folder / "report.html")


def evaluation_text(
    model: "ReplacementModel", corpus: "Corpus", settings: "EvalSettings", comm: "Collectives"
) -> "EvalText":
    """This process's share of the held-out text, training text for the controls, and the prompts for graphs."""
    from ...circuit.judge import EvalText

    pad = model.lm.tokenizer.pad_token_id or 0
    batches, sequences = [], 0
    size = min(settings.batch, max(1, settings.tokens // comm.data_ranks))  # something for every process to do
    for number, group in enumerate(grouped(corpus.sequences("held_out", settings.tokens), size)):
        if number % comm.data_ranks == comm.data_rank:
            batches.append(side_by_side(group, pad, sequences))
        sequences += len(group)
    if sequences == 0:
        raise UserError("the held-out text is empty; give a dataset with more documents, or a larger dataset.held_out")
    training = grouped(corpus.sequences("train", settings.calibration_tokens), settings.batch)
    calibration = [side_by_side(group, pad) for group in training]
    return EvalText(batches, sequences, calibration, *prompts_of(model, settings))


def prompts_of(
    model: "ReplacementModel", settings: "EvalSettings"
) -> "tuple[PromptSet | None, Sequence, Sequence[str]]":
    """The prompts for graphs; where their answers are known, those, and a sentence about each that was left out."""
    if settings.prompts and wanted_set(model, settings) == "questions":
        return questions_for(model, settings)
    return prompts_for(model, settings), (), ()


def wanted_set(model: "ReplacementModel", settings: "EvalSettings") -> str:
    """The name of the prompt set; `auto` goes by the model."""
    if settings.prompt_set != "auto":
        return settings.prompt_set
    folder = Path(model.lm.name).name
    return next((known for start, known in SETS if folder.startswith(start)), "english")


def questions_for(model: "ReplacementModel", settings: "EvalSettings"):
    """Prompts with answers that the model gives, these questions, and sentences about the others."""
    from ...circuit.judge import QUESTIONS, answered, one_of_each, prompt_set

    known, others = answered(model.lm, one_of_each(QUESTIONS, settings.prompts))
    if not known:
        raise UserError("the model answers none of the questions surely; set eval.prompt_set=english")
    return prompt_set("questions", [question.prompt for question in known]), known, others


def prompts_for(model: "ReplacementModel", settings: "EvalSettings") -> "PromptSet | None":
    """The prompt set: the world's own held-out questions where the model is the world."""
    from ...circuit.judge import prompt_set

    if settings.prompts == 0:
        return None
    world = world_of(model.lm) if settings.prompt_set == "auto" else None
    if world is not None:
        questions = [question for family in world.families for question in world.questions(family)]
        step = max(1, len(questions) // settings.prompts)
        return prompt_set("world", [question.prompt for question in questions[::step]][: settings.prompts])
    found = prompt_set(wanted_set(model, settings))
    return found._replace(prompts=found.prompts[: settings.prompts])


def grouped(sequences: "Iterable[TokenSequence]", batch: int) -> "Iterator[list[TokenSequence]]":
    """Sequences in groups that take `batch` tokens together, padding included."""
    group: list[TokenSequence] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence.tokens))
        if group and longest * (len(group) + 1) > batch:
            yield group
            group, longest = [], len(sequence.tokens)
        group.append(sequence)
    if group:
        yield group


def side_by_side(group: "list[TokenSequence]", pad: int, first: int = 0) -> "TextBatch":
    """One batch, padded at the right; a prediction counts where its target is of the same document."""
    import torch

    from ...circuit.judge import TextBatch

    length = max(len(sequence.tokens) for sequence in group)
    tokens_BT = torch.full((len(group), length), pad)
    document_BT = torch.full((len(group), length), -1)
    for row, sequence in enumerate(group):
        tokens_BT[row, : len(sequence.tokens)] = sequence.tokens
        document_BT[row, : len(sequence.document)] = sequence.document
    real_BT = document_BT >= 0
    counted_BT = real_BT.clone()
    counted_BT[:, :-1] &= document_BT[:, :-1] == document_BT[:, 1:]
    return TextBatch(tokens_BT, real_BT, counted_BT, first)


def headline(result: dict[str, Any]) -> dict[str, float | None]:
    """The figures that stand for a run: all layers' means, and the behaviour with all layers replaced."""
    return {name: result["overall"].get(name, result["behaviour"].get(name)) for name in SHOWN}


def overall_table(results: dict[str, dict[str, Any]]):
    """One row a run."""
    return table(
        "all layers", ("run", *SHOWN), [(name, *headline(result).values()) for name, result in results.items()]
    )


def layers_table(result: dict[str, Any]):
    """One row a layer."""
    names = ("nmse", "nmse_median", "worst_share", "fvu", "cosine", "l0", "dead", "dense")
    places = [layer["layer"] for layer in result["health"]["layers"]]
    rows = [(place, *(layer.get(name) for name in names)) for place, layer in zip(places, result["layers"])]
    return table("each layer", ("layer", *names), rows)
