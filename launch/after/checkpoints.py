"""How scores, L0, dead features and one graph changed over a run's checkpoints: `course.json`, for the run's report.

Each checkpoint becomes the transcoder that it would have been exported as; it is measured on the text and the prompts
of `eval`, without controls, and the prompt of one graph is traced. Features keep their numbers in a training, so that
a graph's nodes and edges can be looked for in the last one's.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pages import write_report
from ..terminal import Closing, table
from ..verbs import evaluate, trace
from ..workspace import Job, following, open_corpus, open_replacement, runs

if TYPE_CHECKING:
    from ...circuit.graph import Graph
    from ...circuit.model import ReplacementModel
    from ...data.store import ActivationStore

COURSE = "course.json"
FIGURES = ("nmse", "l0", "dead", "kl", "replacement_score", "completeness", "nodes", "edges")
PROMPTS = 5
"""Prompts whose graphs are scored at each checkpoint."""


def over_checkpoints(job: Job, folder: Path, prompt: str = "") -> Closing:
    """Measure every checkpoint that was kept, and the run itself at the end."""
    from ...circuit.across import Match, held
    from ...circuit.model import ReplacementModel
    from ...train.snapshot import checkpoint_steps, transcoder_at

    words = [f"run={folder}", *(word for word in job.later if word.startswith("eval."))]
    part = following(job, "eval", words, alone=True)
    last = open_replacement(part, folder)
    settings = part.section("eval")
    settings = replace(settings, controls=False, layers=False, pairs=0, prompts=min(settings.prompts, PROMPTS))
    chosen, rows_held_out = prompt or first_prompt(last, settings), held_out_rows(part)
    final = last.trace(chosen).prune()
    slug = trace.graph_folder(folder, None, {"prompt": chosen}, True)
    rows = []
    end = last.transcoder.meta.get("trained_as", {}).get("steps", 0)
    for step in [*(step for step in checkpoint_steps(folder) if step < end), end]:
        model = last if step == end else ReplacementModel(last.lm, transcoder_at(folder, step, rows_held_out))
        result = evaluate.evaluated(model, open_corpus(part, last.lm), settings, job.progress.named(f"step {step}"))
        graph = final if step == end else model.trace(chosen)
        if step < end:
            graph.metadata["prompt"] = chosen
            graph.save(slug / "steps" / f"step-{step}")
            graph = graph.prune()
        same = {(n.layer, n.index): Match(n.index, 1.0, 1.0) for n in final.nodes if n.kind == "feature"}
        found = held(final, [(graph, same)])
        rows.append(row_of(step, result, graph, found))
    runs.write_json(folder / COURSE, {"prompt": chosen, "rows": rows})
    if (folder / "eval.json").is_file():
        write_report([folder], folder / "report.html")
    columns = ("step", *FIGURES, "of the last graph's features", "of its edges")
    shown = [tuple(row.get(name) for name in ("step", *FIGURES, "features_held", "edges_held")) for row in rows]
    return Closing(
        f"{len(rows)} checkpoints looked at",
        tables=[table(f"over training; the graph is of {chosen!r}", columns, shown)],
        wrote=[(str(folder / COURSE), "every figure"), (str(slug / "steps"), "the graph at each checkpoint")],
    )


def held_out_rows(job: Job) -> "ActivationStore":
    """The rows on which thresholds are found, as for the export."""
    from ...data.store import HELD_OUT, ActivationStore

    store = job.section("store")
    if store.mode == "disk":
        return ActivationStore.open(job.store_path, split="held_out")
    return ActivationStore.open(Path(job.store_path, HELD_OUT))


def first_prompt(model: "ReplacementModel", settings: Any) -> str:
    """The first of the prompts that are measured."""
    prompts = evaluate.prompts_of(model, replace(settings, prompts=1))[0]
    assert prompts is not None
    return prompts.prompts[0]


def row_of(step: int, result: dict[str, Any], graph: "Graph", found: Any) -> dict[str, Any]:
    """One checkpoint: its figures, and how much of the last graph it has."""
    parts = (result["overall"], result["behaviour"], result.get("graph", {}))
    row = {name: next((part[name] for part in parts if name in part), None) for name in FIGURES}
    top = graph.logits[0]
    share = lambda counts: sum(count == 2 for count in counts.values()) / max(1, len(counts))
    return {
        "step": step,
        **row,
        "answer": top.label,
        "probability": top.probability,
        "features_held": share(found.features),
        "edges_held": share(found.edges),
    }
