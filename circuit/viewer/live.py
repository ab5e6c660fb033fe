"""Work with a run's model while the page is looked at: answer a prompt, trace a token, steer, split an edge by heads.

One model is held, and one piece of work is done at a time: whoever comes meanwhile is told so. A trace reports how far
it is, and ends where somebody cancels it.
"""

import itertools
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...data.errors import UserError
from ...data.store import ActivationStore
from ...train.snapshot import transcoder_at
from ..attribution import TraceSettings, attention_record, edge_record, explain_head
from ..features import Labels, labels_path, name_features
from ..graph import Graph
from ..model import ReplacementModel
from ..replacement import MODES
from .api import Ask, answer, load_graph, looked_at
from .picture import render_graph_svg
from .runs import Run, Runs, inside
from .steering import key_ids, steered

MOST_PROMPT, MOST_NEW, JOBS_KEPT = 20_000, 64, 20


class Cancelled(Exception):
    """Somebody has called the work off."""


@dataclass
class Job:
    """A trace at work, or how it ended."""

    id: str
    state: str = "running"
    label: str = "opening the model"
    done: float = 0
    total: float | None = None
    run: str = ""
    slug: str = ""
    step: int | None = None
    error: str = ""
    cancelled: bool = False

    def progress(self, label: str, done: float, total: float | None = None, note: str = "") -> None:
        if self.cancelled:
            raise Cancelled
        self.label, self.done, self.total = label, done, total

    def summary(self) -> dict[str, Any]:
        names = ("id", "state", "label", "done", "total", "run", "slug", "step", "error")
        return {name: getattr(self, name) for name in names}


class Live:
    """The half of the viewer that needs a model. `open_model` opens that of a run's folder."""

    def __init__(self, runs: Runs, open_model: Callable[[Path], ReplacementModel] | None = None):
        self.found = runs
        self.open_model = open_model or (lambda folder: ReplacementModel.load(folder, lazy_decoders=True))
        self._working = threading.Lock()
        self._model: tuple[Path, int, ReplacementModel] | None = None
        self._earlier: tuple[ReplacementModel, int, ReplacementModel] | None = None  # its model at a checkpoint
        self._jobs: dict[str, Job] = {}

    def routes(self) -> list[Route]:
        posts = {"answer": self.answer, "trace": self.trace, "cancel": self.cancel, "steer": self.steer}
        posts |= {"heads": self.heads, "attention": self.attention, "trace-step": self.trace_step}
        return [
            Route("/api/job", answer(self.job)),
            *(Route(f"/api/{name}", answer(work), methods=["POST"]) for name, work in posts.items()),
        ]

    def close(self) -> None:
        """Call off what is at work."""
        for job in self._jobs.values():
            job.cancelled = True

    # -- what is asked -------------------------------------------------------------------------------------------

    def answer(self, ask: Ask) -> Response:
        """How the model goes on from a prompt, token by token."""
        prompt = ask.text("prompt", most=MOST_PROMPT)
        if not prompt.strip():
            raise UserError("type a prompt first")
        with self._at_work(self._run(ask)) as model:
            generated = model.generate(prompt, [], max(1, ask.whole("tokens", 12, MOST_NEW)))
            ids = generated.tokens.tolist()
            best = generated.clean_probabilities.topk(min(8, len(generated.clean_probabilities)))
            names = model.lm.token_strings(best.indices)
            return JSONResponse(
                {
                    "ids": ids,
                    "tokens": model.lm.token_strings(generated.tokens),
                    "prompt_length": generated.prompt_length,
                    "next": [[name, p] for name, p in zip(names, best.values.tolist(), strict=True)],
                }
            )

    def trace(self, ask: Ask) -> Response:
        """Begin to trace what comes after `ids`; where `token` names what did come, that is explained too."""
        run, ids, token = self._run(ask), whole_numbers(ask.body.get("ids")), ask.body.get("token")
        if token is not None:
            token = whole_numbers([token])[0]
        return self._begin(run, lambda job: self._trace(job, run, ids, token))

    def trace_step(self, ask: Ask) -> Response:
        """Begin to trace a graph's prompt with the transcoder of one of the run's checkpoints."""
        run, folder = self.found.graph(ask.text("run"), ask.text("slug"))
        step = ask.whole("step")
        if step not in run.steps:
            raise UserError(f"run {run.name!r} has no checkpoint of step {step}")
        return self._begin(run, lambda job: self._trace_step(job, run, folder, step))

    def job(self, ask: Ask) -> Response:
        return JSONResponse(self._job(ask).summary())

    def cancel(self, ask: Ask) -> Response:
        job = self._job(ask)
        job.cancelled = True
        return JSONResponse(job.summary())

    def steer(self, ask: Ask) -> Response:
        """What changed multipliers do: probabilities, groups' activations, text, predicted against measured."""
        run, graph, step = self._asked(ask)
        mode = ask.text("mode") or "steer"
        if mode not in MODES:
            raise UserError(f"mode={mode[:40]} is not known; it takes one of {', '.join(MODES)}")
        with self._at_work(run, step) as model:
            return JSONResponse(steered(model, graph, ask.body, mode, ask.whole("tokens", 0, MOST_NEW)))

    def heads(self, ask: Ask) -> Response:
        """The heads that an edge of a graph goes through, the strongest first."""
        run, graph, step = self._asked(ask)
        target, source = key_ids(graph, [ask.text("target"), ask.text("source")])
        with self._at_work(run, step) as model:
            return JSONResponse(edge_record(graph, model.heads(graph, [(target, source)])[0]))

    def attention(self, ask: Ask) -> Response:
        """Why a head looked where it did: from a query, or from where most of an edge went through it."""
        run, graph, step = self._asked(ask)
        layer, head = ask.whole("layer"), ask.whole("head")
        with self._at_work(run, step) as model:
            if not ask.text("target"):
                return JSONResponse(attention_record(model.attention(graph.tokens, layer, head, ask.whole("query"))))
            target, source = key_ids(graph, [ask.text("target"), ask.text("source")])
            found = model.heads(graph, [(target, source)])[0]
            if layer not in found.between or head >= found.heads.shape[1]:
                raise UserError(f"no attention of layer {layer}, head {head} lies between the two")
            return JSONResponse(explain_head(model, graph, found, layer, head))

    # -- how it is done ------------------------------------------------------------------------------------------

    def _asked(self, ask: Ask) -> tuple[Run, Graph, int | None]:
        run, _, shown = looked_at(self.found, ask)
        return run, load_graph(run, shown)[0], ask.optional("step")

    def _run(self, ask: Ask) -> Run:
        run = self.found.run(ask.text("run"))
        if not run.has_transcoder:
            raise UserError(f"run {run.name!r} has no transcoder, so there is nothing to trace with")
        return run

    def _job(self, ask: Ask) -> Job:
        job = self._jobs.get(ask.text("id"))
        if job is None:
            raise UserError("there is no such trace")
        return job

    @contextmanager
    def _at_work(self, run: Run, step: int | None = None) -> Iterator[ReplacementModel]:
        """The run's model, for one piece of work at a time; short ones wait for each other."""
        if not self._working.acquire(timeout=20):
            raise UserError("the model is at work; wait for it, or cancel the trace")
        try:
            yield self._opened(run, step)
        finally:
            self._working.release()

    def _opened(self, run: Run, step: int | None = None) -> ReplacementModel:
        if not run.has_transcoder:
            raise UserError(f"run {run.name!r} has no transcoder, so its model cannot be asked")
        written = (run.folder / "transcoder" / "transcoder.json").stat().st_mtime_ns
        if self._model is None or self._model[:2] != (run.folder, written):
            self._model = self._earlier = None  # the memory of one is free before another is opened
            self._model = run.folder, written, self.open_model(run.folder)
        model = self._model[2]
        if step is None:
            return model
        if self._earlier is None or self._earlier[:2] != (model, step):
            self._earlier = None
            rows = ActivationStore.open(run.store, "held_out") if run.store else None
            transcoder = transcoder_at(run.folder, step, rows).to(model.lm.device)
            self._earlier = model, step, ReplacementModel(model.lm, transcoder)
        return self._earlier[2]

    def _begin(self, run: Run, work: Callable[[Job], None]) -> Response:
        """Set work going in a thread of its own; however it ends, the job says so."""
        if not self._working.acquire(blocking=False):
            raise UserError("the model is at work; wait for it, or cancel the trace")
        job = Job(secrets.token_hex(8), run=run.name)
        self._jobs[job.id] = job
        while len(self._jobs) > JOBS_KEPT:
            self._jobs.pop(next(iter(self._jobs)))

        def whole() -> None:
            try:
                work(job)
                job.state = "done"
            except Cancelled:
                job.state = "cancelled"
            except UserError as error:
                job.state, job.error = "failed", str(error)
            except Exception as error:  # shown to whoever waits
                job.state, job.error = "failed", f"the trace failed ({type(error).__name__}: {str(error)[:300]})"
            finally:
                self._working.release()

        threading.Thread(target=whole, daemon=True).start()
        return JSONResponse(job.summary())

    def _trace(self, job: Job, run: Run, ids: list[int], token: int | None) -> None:
        model = self._opened(run)
        job.progress("running the model", 0)
        wanted = None if token is None else targets_with(model, ids, token)
        graph = model.trace(ids, targets=wanted, progress=job.progress)
        job.slug = self._write(job, run, graph, free_folder(run, str(graph.metadata["prompt"]))).name

    def _trace_step(self, job: Job, run: Run, folder: Path, step: int) -> None:
        """With the settings and the targets of the graph that is there, so that the two can be compared."""
        job.slug, job.step = folder.name, step
        before, _ = load_graph(run, folder)
        job.progress(f"opening step {step}", 0)
        model = self._opened(run, step)
        asked = before.metadata.get("asked", {}).get("trace", {})
        known = {field.name for field in fields(TraceSettings)}
        settings = TraceSettings(**{name: value for name, value in asked.items() if name in known})
        tokens = [logit.token for logit in before.logits]
        if settings.targets is None and all(token >= 0 for token in tokens):
            settings = replace(settings, targets=tokens)
        graph = model.trace(before.tokens, settings, progress=job.progress)
        graph.metadata |= {"prompt": before.metadata.get("prompt", graph.metadata["prompt"]), "step": step}
        shown = folder / "steps" / f"step-{step}"
        if not inside(run.root, shown):
            raise UserError("the graphs of this run lie outside the folder that is shown")
        self._write(job, run, graph.carrying(settings.share_to_keep()), shown)

    def _write(self, job: Job, run: Run, graph: Graph, folder: Path) -> Path:
        job.progress("writing", 0)
        if not inside(run.root, labels_path(run.folder)):
            raise UserError("the labels of this run lie outside the folder that is shown")
        labels = Labels.load(run.folder)
        name_features(graph, labels)
        graph.save(folder)
        (folder / "graph.svg").write_text(render_graph_svg(graph, labels), "utf-8")
        return folder


def targets_with(model: ReplacementModel, ids: list[int], token: int) -> list[int]:
    """The likely next tokens, and the one that is asked about."""
    import torch

    with torch.no_grad():
        logits = model.lm(model.lm.tokenize(ids)[None])[0, -1]
    values, likely = logits.float().softmax(-1).topk(min(10, len(logits)))
    enough = int((values.double().cumsum(0) < 0.95).sum()) + 1
    return list(dict.fromkeys([*likely[:enough].tolist(), token]))


def whole_numbers(ids: Any) -> list[int]:
    """Token ids from a request."""
    if not isinstance(ids, list) or not ids or len(ids) > MOST_PROMPT:
        raise UserError(f"ids takes a list of 1 to {MOST_PROMPT} token ids")
    if not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        raise UserError("ids takes token ids alone")
    return ids


def free_folder(run: Run, prompt: str) -> Path:
    """A folder for a new graph, called by the prompt's last words; what is there is never written over."""
    slug = "-".join(re.findall(r"[A-Za-z0-9]+", prompt.lower())[-6:])[:80] or "graph"
    numbered = itertools.chain([slug], (f"{slug}-{number}" for number in itertools.count(2)))
    graphs = run.folder / "graphs"
    if not inside(run.root, graphs):
        raise UserError("the graphs of this run lie outside the folder that is shown")
    return next(graphs / name for name in numbered if not (graphs / name).exists())
