"""`crosslace eval`: measure a transcoder on held-out text, and write the figures and a page about them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..data.errors import UserError
from . import runs
from .job import Job
from .sources import open_corpus, open_replacement, world_of
from .terminal import Closing, table

if TYPE_CHECKING:
    from torch import Tensor

    from ..circuit.evaluation import EvalSettings, EvalText
    from ..circuit.prompts import PromptSet
    from ..circuit.replacement import ReplacementModel
    from ..data.corpus import Corpus, TokenSequence


def run(job: Job) -> Closing:
    """Evaluate a run."""
    folder = Path(job.top.run)
    runs.writable(folder)
    model = open_replacement(job, folder)
    corpus = open_corpus(job, model.lm)
    result = evaluated(model, corpus, job.section("eval"), job.progress)
    result["settings"] = {name: job.config.values[name] for name in ("eval", "dataset", "model")}
    write(folder, result)
    return Closing(
        "evaluated",
        tables=[overall_table({folder.name: result}), layers_table(result)],
        notes=result.get("verdicts", []),
        wrote=[(str(folder / "eval.json"), "every figure"), (str(folder / "report.html"), "a page about the run")],
        next=[f"crosslace features run={folder}", f'crosslace trace run={folder} prompt="..."'],
    )


def evaluated(model: "ReplacementModel", corpus: "Corpus", settings: "EvalSettings", progress: Any) -> dict[str, Any]:
    """The figures of `eval.json`, with what they were measured on."""
    from ..circuit.evaluation import evaluate

    text = evaluation_text(model, corpus, settings)
    result = evaluate(model, text, settings, progress=progress)
    result["made_with"] = {
        "crosslace": __version__,
        "model": model.lm.fingerprint,
        "dataset": corpus.fingerprint,
        "prompts": text.prompts.label if text.prompts else None,
        "seed": settings.seed,
    }
    return result


def write(folder: Path, result: dict[str, Any]) -> None:
    """`eval.json`, then the page."""
    from .report import write_report

    runs.write_json(folder / "eval.json", result)
    write_report([folder], folder / "report.html")


def evaluation_text(model: "ReplacementModel", corpus: "Corpus", settings: "EvalSettings") -> "EvalText":
    """Held-out text in batches of equal length, training text for the controls, and the prompts for graphs."""
    import torch

    from ..circuit.behaviour import TextBatch
    from ..circuit.evaluation import EvalText

    batches, sequences = [], 0
    for tokens_BT in equal_length(corpus.sequences("held_out", settings.tokens), settings.batch):
        counted_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        batches.append(TextBatch(tokens_BT, counted_BT, sequences))
        sequences += len(tokens_BT)
    if not batches:
        raise UserError("the held-out text is empty; give a dataset with more documents, or a larger dataset.held_out")
    calibration = list(equal_length(corpus.sequences("train", settings.calibration_tokens), settings.batch))
    return EvalText(batches, sequences, calibration, prompts_for(model, settings))


def prompts_for(model: "ReplacementModel", settings: "EvalSettings") -> "PromptSet | None":
    """The prompt set: the world's own held-out questions where the model is the world."""
    from ..circuit.prompts import prompt_set

    if settings.prompts == 0:
        return None
    world = world_of(model.lm) if settings.prompt_set == "auto" else None
    if world is not None:
        questions = [q for family in world.families for q in world.questions(family)]
        step = max(1, len(questions) // settings.prompts)
        return prompt_set("world", [q.prompt for q in questions[::step]][: settings.prompts])
    name = "english" if settings.prompt_set == "auto" else settings.prompt_set
    found = prompt_set(name)
    return found._replace(prompts=found.prompts[: settings.prompts])


def equal_length(sequences: "Iterable[TokenSequence]", batch: int) -> "Iterator[Tensor]":
    """Batches [B, T] of about `batch` tokens: sequences of one length together, so that nothing is padded."""
    import torch

    waiting: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        length = len(sequence.tokens)
        group = waiting.setdefault(length, [])
        group.append(sequence.tokens)
        if (len(group) + 1) * length > batch:
            yield torch.stack(waiting.pop(length))
    for _, group in sorted(waiting.items()):
        yield torch.stack(group)


SHOWN = ("nmse", "l0", "dead", "top1", "kl", "ce_recovered")


def headline(result: dict[str, Any]) -> dict[str, float | None]:
    """The six figures of the demo's summary, of all layers and with all layers replaced."""
    overall, behaviour = result["overall"], result["behaviour"]
    return {name: (overall if name in overall else behaviour).get(name) for name in SHOWN}


def overall_table(results: dict[str, dict[str, Any]]):
    """One row a run."""
    rows = [(name, *headline(result).values()) for name, result in results.items()]
    return table("all layers", ("run", *SHOWN), rows)


def layers_table(result: dict[str, Any]):
    """One row a layer."""
    names = ("nmse", "fvu", "cosine", "l0", "dead", "dense")
    rows = [(layer.get("layer", i), *(layer.get(name) for name in names)) for i, layer in enumerate(result["layers"])]
    return table("each layer", ("layer", *names), rows)
