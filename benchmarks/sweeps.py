"""What sweeps are worth, in three parts.

python -m benchmarks.sweeps stack --store stores/world [--cold] [--streaming] [--counts 4,8] SETTINGS
    seconds for each of 4 and 8 configurations, trained one after another and side by side (`--cold` drops the
    store's files from the page cache after each batch, as for a store that is larger than memory)
python -m benchmarks.sweeps seeds RUN RUN ...    over seeds of one configuration: which edges hold on the world
python -m benchmarks.sweeps steps RUN ...        path length, and whether a cross-layer transcoder skips steps
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from crosslace.circuit.across import held, match_features
from crosslace.circuit.features import Labels
from crosslace.circuit.graph import GraphPath
from crosslace.circuit.judge.graph_scores import path_length
from crosslace.circuit.judge.perturbation import steps_skipped
from crosslace.circuit.model import ReplacementModel
from crosslace.data.store import ActivationStore, Batch
from crosslace.launch.known_world import label_features
from crosslace.launch.known_world.circuits import question_path
from crosslace.launch.settings import grid
from crosslace.launch.sweeps.running import Combination
from crosslace.launch.sweeps.stack import train_together
from crosslace.launch.sweeps.sweep import part_of
from crosslace.launch.verbs import train
from crosslace.launch.workspace import open_model, start, world_of


def evicted_after_each_batch(store: Path) -> None:
    """From now on, no read of a batch finds its bytes in memory."""
    files = [path for path in store.rglob("*") if path.is_file()]
    read = ActivationStore._batch

    def cold(
        self: ActivationStore, epoch: int, step: int, size: int, layers: Sequence[int] | None, rank: int, world: int,
        pin: bool,
    ) -> Batch:  # fmt: skip
        batch = read(self, epoch, step, size, layers, rank, world, pin)
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return batch

    ActivationStore._batch = cold


def seconds(folder: Path, words: list[str], count: int, stacked: bool, streaming: bool) -> tuple[float, float]:
    """Train `count` configurations; wall and CPU seconds for each. Each harvests anew where it streams alone."""
    words = [*words, "wandb.mode=disabled", "init=random"]
    words += ["store.mode=streaming"] if streaming else []
    begun, used = time.perf_counter(), time.process_time()
    if stacked:
        words += [f"store={folder / 'ring'}"] if streaming else []
        job = start("sweep", [f"run={folder}", *words, f"trainer.seed={','.join(map(str, range(count)))}"])
        jobs = [Combination(folder / one.name, one.words) for one in grid(job.words)]
        parts = {one.folder: part_of(job, one) for one in jobs}
        failed = train_together(parts, list(parts))
        assert not failed, failed
    for seed in () if stacked else range(count):
        ring = [f"store={folder / f'ring-{seed}'}"] if streaming else []
        run = folder / f"alone-{seed}"
        train.fit(start("train", [f"run={run}", *words, *ring, f"trainer.seed={seed}"]), run)
    return (time.perf_counter() - begun) / count, (time.process_time() - used) / count


def stack(options: argparse.Namespace) -> None:
    """One after another, and side by side."""
    words = [*options.words] if options.streaming else [f"store={options.store}", *options.words]
    if options.cold:
        evicted_after_each_batch(Path(options.store))
    for count in map(int, options.counts.split(",")):
        found = {}
        for stacked in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                found[stacked] = seconds(Path(folder), words, count, stacked, options.streaming)
        for place, what in enumerate(("wall", "CPU")):
            alone, together = found[False][place], found[True][place]
            saved = f"{1 - together / alone:.0%} saved"
            print(f"{count}: alone {alone:.2f} {what} s each, stacked {together:.2f}, {saved}", flush=True)


def opened(runs: list[str]) -> list[ReplacementModel]:
    """Runs on one model."""
    job = start("trace", [f"run={runs[0]}", "prompt=x"])
    lm = open_model(job).widened(own=True)
    return [ReplacementModel.load(Path(run) / "transcoder", lm) for run in runs]


def seeds(options: argparse.Namespace) -> None:
    """Of the world's capital questions: the true path in each seed, and how many of its edges are found again."""
    models = opened(options.words)
    world = world_of(models[0].lm)
    labels = [Labels() for _ in models]
    for one, model in zip(labels, models):
        one.update(label_features(model, world, 0))
    questions = [q for q in world.questions("two_hop", "held_out") if q.facts["relation"] == "capital"]
    questions = random.Random(0).sample(questions, options.questions)
    text = [torch.tensor(world.tokens(q)) for q in world.questions()[:: options.every]]
    right, along, edges, chance = 0, [], [], []
    for question in questions:
        graphs = [model.trace(question.prompt).prune(node=0.8, edge=0.98) for model in models]
        paths = [question_path(world, graph, one, question) for graph, one in zip(graphs, labels)]
        true = [path is not None and path.state == f"state: {question.facts['state']}" for path in paths]
        right += all(true)
        if paths[0] is None or not true[0]:
            continue
        own, *others = (model.transcoder for model in models)
        features = {(n.layer, n.index) for n in graphs[0].nodes if n.kind == "feature"}
        matches = match_features(models[0].lm, own, others, features, text)
        path = GraphPath(paths[0].nodes, paths[0].strength)
        found = held(graphs[0], list(zip(graphs[1:], matches)), [path])
        nodes = found.paths[0][1]
        along.append(mean(found.edges[pair] - 1 for pair in pairwise(nodes)) / len(others))
        edges.append(found.share_of_edges)
        wrong = [dict(zip(match, random.Random(0).sample(list(match.values()), len(match)))) for match in matches]
        chance.append(held(graphs[0], list(zip(graphs[1:], wrong))).share_of_edges)
    n = len(questions)
    print(f"true path in all {len(models)} seeds: {right} of {n} questions")
    print(f"edges of the true path found in another seed: {mean(along):.0%}; all edges: {mean(edges):.0%}")
    print(f"all edges, features paired at random: {mean(chance):.0%}")


def steps(options: argparse.Namespace) -> None:
    """Path length and the share of steps that are skipped, for each family of the world's questions."""
    for run, model in zip(options.words, opened(options.words)):
        world = world_of(model.lm)
        kinds = [(family, "held_out", "combination") for family in world.families]
        for family, split, kind in [*kinds, ("two_hop", "train", "fact")]:
            asked = world.questions(family, split, kind)
            asked = random.Random(0).sample(asked, min(options.questions, len(asked)))
            graphs = [model.trace(q.prompt) for q in asked]
            found = steps_skipped(model, graphs, 0.8) if model.transcoder.reach > 1 else {}
            length = mean(path_length(graph) for graph in graphs)
            print(f"{run} {family} {kind}: {len(asked)} questions, path length {length:.3f}", found, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["stack", "seeds", "steps"])
    parser.add_argument("--store", default="")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--counts", default="4,8")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--every", type=int, default=8, help="each how many-th question is text to compare features on")
    parser.add_argument("words", nargs="*", help="stack: settings of the trainings; else: runs")
    options = parser.parse_intermixed_args()  # settings may stand before and after options
    {"stack": stack, "seeds": seeds, "steps": steps}[options.what](options)


if __name__ == "__main__":
    main()
