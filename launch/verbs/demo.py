"""`crosslace demo`: from nothing to a circuit one can believe, on the bundled world or on SmolLM2.

The stages run in order, each skipped where it is done already, so that a demo that was stopped goes on:
cache -> train -> eval -> features -> trace (-> swap), then `summary.json` and `report.html`.
The folder holds ordinary runs, `clt` and `plt` on the world, `plt` on SmolLM2, for every other verb to use.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import SettingsError
from ..settings import Config, preset
from ..terminal import Closing, duration, table
from ..workspace import Job, open_corpus, open_replacement, runs, world_of
from . import cache, evaluate, features, train

if TYPE_CHECKING:
    from ...circuit.model import ReplacementModel
    from ...data.worlds import World

PROMPT = "the capital of the state containing Dallas is"
SLUG = "dallas"
KEPT = ("demo", "world", "model", "dataset", "store", "transcoder", "trainer", "eval", "trace", "features")


def run(job: Job) -> Closing:
    """Everything."""
    folder, model = Path(job.top.run), job.config.values["model"]["name"]
    if model not in DEMOS:
        raise SettingsError(f"crosslace demo shows {' or '.join(DEMOS)}; for model={model} take the verbs one by one")
    config = {"seed": job.config.values["seed"], **{name: job.config.values[name] for name in KEPT}}
    runs.claim(folder, config)
    return DEMOS[model](job, folder).tell()


class Story:
    """The stages of a demo, and what they found: one file each in `stages/`."""

    kinds: tuple[str, ...]
    """The runs that it makes, each of the preset of its name."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.found: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        if (folder / "stages" / "seconds.json").is_file():
            self.seconds = runs.read_json(folder / "stages" / "seconds.json")
        self._models: dict[str, ReplacementModel] = {}

    def stages(self) -> dict[str, Callable[[], Any]]:
        """In order."""
        raise NotImplementedError

    def tell(self) -> Closing:
        """Every stage, the page, the last words."""
        raise NotImplementedError

    def do(self, name: str, stage: Callable[[], Any]) -> None:
        """One stage, unless its result is there."""
        path = self.folder / "stages" / f"{name}.json"
        if not path.is_file():
            with self.timed(name):
                runs.write_json(path, stage())
        self.found[name] = runs.read_json(path)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count a stage's time, that of a call which was interrupted included."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            runs.write_json(self.folder / "stages" / "seconds.json", self.seconds)

    def cache(self) -> dict[str, Any]:
        cache.fill(self.part("cache"))
        return {"store": str(self.folder / "store")}

    def train(self) -> dict[str, Any]:
        for kind in self.kinds:
            result = train.fit(self.part("train", kind), self.folder / kind)
            if result is not None and result.status != "finished":
                raise KeyboardInterrupt
        return {kind: str(self.folder / kind) for kind in self.kinds}

    def measured(self, kind: str) -> dict[str, Any]:
        """Evaluate a run, and write its page."""
        part, model = self.part("eval", kind), self.model(kind)
        corpus, settings = open_corpus(part, model.lm), part.section("eval")
        result = evaluate.evaluated(model, corpus, settings, part.progress.named(kind))
        result["made_with"]["settings"] = evaluate.asked(part)
        evaluate.write(self.folder / kind, result)
        return result

    @property
    def seed(self) -> int:
        return int(self.job.config.values["seed"])

    def model(self, kind: str) -> "ReplacementModel":
        """A run's replacement model, opened once."""
        if kind not in self._models:
            self._models[kind] = open_replacement(self.part("trace", kind), self.folder / kind)
        return self._models[kind]

    def part(self, verb: str, kind: str = "") -> Job:
        """This job as another verb would have it: with the demo's store and run."""
        kind = kind or self.kinds[0]
        values = copy.deepcopy(self.job.config.values)
        values["store"]["path"] = str(self.folder / "store")
        values["run"] = str(self.folder / kind)
        values["transcoder"] |= preset("transcoder", kind)[1]
        progress = self.job.progress.named(kind) if verb == "train" else self.job.progress
        return replace(self.job, verb=verb, config=Config("demo", values, self.job.config.given), progress=progress)


class WorldDemo(Story):
    """The bundled world: a CLT and a PLT, a circuit that can be checked, and the swap of a state."""

    kinds = ("clt", "plt")

    def tell(self) -> Closing:
        for name, stage in self.stages().items():
            self.do(name, stage)
        summary = self.summary()
        runs.write_json(self.folder / "summary.json", summary)
        from ..pages import write_demo_report

        write_demo_report(self.folder, summary)
        return closing(self.folder, summary)

    def stages(self) -> dict[str, Callable[[], Any]]:
        return {
            "world": self.world,
            "cache": self.cache,
            "train": self.train,
            "eval": self.eval,
            "features": self.features,
            "trace": self.trace,
            "swap": self.swap,
        }

    # -- the stages -----------------------------------------------------------------------------------------------

    def world(self) -> dict[str, Any]:
        from ...data.worlds import World
        from ..workspace import bundled_folder

        world = World.load(bundled_folder("world", self.job.section("world"), self.job.progress))
        held_out = world.record["accuracy"]["held_out"]
        return {"families": {family: {"held_out_accuracy": value} for family, value in held_out.items()}}

    def eval(self) -> dict[str, Any]:
        found = {}
        for kind in self.kinds:
            found[kind] = evaluate.headline(self.measured(kind)) | {"top1": self.answered(self.model(kind))}
        return found

    def answered(self, model: "ReplacementModel") -> float:
        """The share of the model's answers to held-out questions that it still gives with every MLP replaced."""
        world = self.the_world(model)
        questions = world.questions(split="held_out")
        known = [q for q, right in zip(questions, world.correct(model.lm, questions, model.lm.device)) if right]
        return sum(map(bool, world.correct(model.replaced_logits, known, model.lm.device))) / len(known)

    def features(self) -> dict[str, Any]:
        from ...circuit.features import Labels, build_features
        from ..known_world import label_features, state_features

        found = {}
        for kind in self.kinds:
            part, run = self.part("features", kind), self.folder / kind
            model = self.model(kind)
            progress = part.progress.named(kind)
            labels = Labels.load(run)
            labels.update(label_features(model, self.the_world(model), part.top.seed, progress))
            labels.save(run)
            build_features(model, open_corpus(part, model.lm), run, part.section("features"), progress)
            features.remember(run, part)
            found[kind] = {"named": len(labels), "states_with_detectors": len(state_features(labels))}
        return found

    def trace(self) -> dict[str, Any]:
        from ..known_world import check_paths, traced

        settings, result = self.job.section("trace"), {}
        for kind in reversed(self.kinds):
            model = self.model(kind)
            world = self.the_world(model)
            question = world.question(PROMPT)
            assert question is not None
            self.job.progress(f"tracing ({kind})", 0, 1)
            result = traced(model, world, self.folder / kind, question, SLUG, settings)
            self.job.progress(f"tracing ({kind})", 1, 1)
        model, cities = self.model("clt"), self.job.section("demo").cities
        world, labels = self.the_world(model), self.labels("clt")
        return {**result, "checked": check_paths(model, world, labels, cities, settings, self.seed, self.job.progress)}

    def swap(self) -> dict[str, Any]:
        from ..known_world import state_coded, swap

        model, pairs = self.model("clt"), self.job.section("demo").pairs
        world = self.the_world(model)
        coded = state_coded(model, world, self.seed)
        swaps = swap.run_swaps(model, world, coded, pairs, self.seed, self.job.progress)
        runs.write_json(self.folder / "swap.json", swap.records(swaps))
        return swap.summary(swaps)

    # -- what they share -------------------------------------------------------------------------------------------

    def the_world(self, model: "ReplacementModel") -> "World":
        world = world_of(model.lm)
        assert world is not None
        return world

    def labels(self, kind: str):
        from ...circuit.features import Labels

        return Labels.load(self.folder / kind)

    def summary(self) -> dict[str, Any]:
        """`summary.json`."""
        trace = {k: v for k, v in self.found["trace"].items() if k != "checked"}
        seconds = {
            name: self.seconds.get(name, 0.0) for name in ("world", "cache", "train", "eval", "features", "trace")
        }
        return {
            "world": self.found["world"],
            "transcoders": self.found["eval"],
            "graph": trace,
            "swap": self.found["swap"],
            "seconds": {**seconds, "total": sum(self.seconds.values())},
        }


def closing(folder: Path, summary: dict[str, Any]) -> Closing:
    """The summary for the terminal."""
    worlds = [(name, entry["held_out_accuracy"]) for name, entry in summary["world"]["families"].items()]
    kinds = [(kind, *figures.values()) for kind, figures in summary["transcoders"].items()]
    graph, swap = summary["graph"], summary["swap"]
    return Closing(
        f"the demo took {duration(summary['seconds']['total'])}",
        tables=[
            table("the world answers held-out questions", ("family", "accuracy"), worlds),
            table("transcoders", ("run", *next(iter(summary["transcoders"].values()))), kinds),
        ],
        notes=[
            f'"{graph["prompt"]}" -> {graph["top_token"]}: {" -> ".join(graph["path"])}',
            f"swapping the state's features changed the answer in {swap['success_rate']:.0%} of {swap['pairs']} "
            f"held-out pairs, random ones in {swap['control_success_rate']:.0%}",
        ],
        wrote=[
            (str(folder / "report.html"), "the whole story on one page"),
            (str(folder / "summary.json"), "its figures"),
            *((str(folder / kind), "a run for every other verb") for kind in WorldDemo.kinds),
        ],
        next=[f"crosslace view run={folder}", f'crosslace trace run={folder / "clt"} prompt="the bird of Texas is"'],
    )


class ModelDemo(Story):
    """A language model that nobody here trained: a PLT, its figures beside controls, and circuits that are tested."""

    kinds = ("plt",)

    def tell(self) -> Closing:
        for name, stage in self.stages().items():
            self.do(name, stage)
        result = runs.read_json(self.folder / "plt" / "eval.json")
        summary = {
            "transcoders": {"plt": self.found["eval"]},
            "controls": result["controls"],
            "causal": {name: value for name, value in result["causal"].items() if name not in ("silenced", "swapped")},
            "graphs": self.found["trace"],
            "seconds": self.seconds | {"total": sum(self.seconds.values())},
        }
        runs.write_json(self.folder / "summary.json", summary)
        from ..pages import write_model_demo_report

        write_model_demo_report(self.folder, summary, result)
        left = summary["causal"]["left_of_the_answer"]
        return Closing(
            f"the demo took {duration(summary['seconds']['total'])}",
            tables=[
                table(
                    "controls",
                    ("", *next(iter(result["controls"].values()))),
                    [(name, *row.values()) for name, row in result["controls"].items()],
                )
            ],
            notes=[
                f"silencing the features of an answer's strongest paths left {left['path']['mean']:.0%} of its "
                f"probability, as many matched features {left['matched']['mean']:.0%}",
                *(f"{graph['prompt']!r}: {graph['path']}" for graph in self.found["trace"]),
            ],
            wrote=[
                (str(self.folder / "report.html"), "the whole story on one page"),
                (str(self.folder / "summary.json"), "its figures"),
                (str(self.folder / "plt"), "a run for every other verb"),
            ],
            next=[f"crosslace view run={self.folder / 'plt'}"],
        )

    def stages(self) -> dict[str, Callable[[], Any]]:
        return {"cache": self.cache, "train": self.train, "eval": self.eval, "features": self.features,
                "trace": self.trace}  # fmt: skip

    def eval(self) -> dict[str, Any]:
        return evaluate.headline(self.measured("plt"))

    def features(self) -> dict[str, Any]:
        from ...circuit.features import build_features

        part, model = self.part("features"), self.model("plt")
        build_features(model, open_corpus(part, model.lm), self.folder / "plt", part.section("features"), part.progress)
        features.remember(self.folder / "plt", part)
        return {}

    def trace(self) -> list[dict[str, Any]]:
        """A graph and a picture of one question of each kind that the evaluation asked."""
        from ...circuit.graph import path_text
        from ...circuit.viewer import render_graph_svg

        model, settings = self.model("plt"), self.job.section("trace")
        asked = runs.read_json(self.folder / "plt" / "eval.json")["causal"]["silenced"]
        first = list({row["kind"]: row for row in reversed(asked)}.values())[::-1]
        found = []
        for row in first[: self.job.section("demo").circuits]:
            graph = model.trace(row["prompt"], settings)
            graph.metadata |= {"prompt": row["prompt"], "asked": {"prompt": row["prompt"], "trace": asdict(settings)}}
            slug = row["kind"].replace(" ", "-")
            folder = graph.save(self.folder / "plt" / "graphs" / slug)
            runs.write_text(folder / "graph.svg", render_graph_svg(graph, title=row["prompt"]))
            paths = graph.top_paths(None, graph.logits[0].id, direct=False)
            text = path_text(graph, paths[0]) if paths else ""
            found.append({**row, "path_silenced": row["path"], "path": text, "slug": slug, **graph.scores()})
            self.job.progress("tracing", len(found), len(first))
        return found


DEMOS: dict[str, type[Story]] = {"world": WorldDemo, "smollm2": ModelDemo}
"""By the model's name."""
