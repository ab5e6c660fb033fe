"""Whether proposed groups of features are the bundled world's concepts, and whether the model needs them.

    python -m benchmarks.supernodes RUN [--questions 40] [--by tokens,tokens+together,...] [--json]

Of held-out two-hop questions, graphs are pruned to `--node` of their influence and grouped. Features are labelled from
the world's truth on questions that it was trained on; groups see no label. The truth of a graph: features that are
named after one concept, at one position. It speaks of

- `holds`: the features of which a concept holds at their position in this question, each by the one that it detects
  best of those (what a feature that is named after Michigan alone does in a question about Virginia is not known: its
  name is wrong there, and the world has no truth to group it by), and
- `all`: those, and the others by their names, as if every name were right everywhere.

`named` and `holding` are how many those are, in all graphs.

`ari` is the adjusted Rand index over those features, a mean over graphs; `found` the share of groups of two or more
features of the question's state for which one proposed group, of those features, has at least half in F1. Then, over
the answers that the model gives: the share of their probability that is left with the groups silenced (`left`), or
with as many matched features (`left_matched`), and with all else silenced (`kept`), or all but the matched ones
(`kept_matched`).
"""

import argparse
import json
import random

import torch
from crosslace.circuit.features import Together
from crosslace.circuit.graph import Graph, propose_supernodes
from crosslace.circuit.judge import judge_groups
from crosslace.circuit.model import ReplacementModel
from crosslace.data.worlds import Question, World
from crosslace.launch.known_world import label_features
from crosslace.launch.workspace import world_of
from torch import Tensor

WAYS = "tokens,tokens+together,together,edges,decoder"


def adjusted_rand(truth: Tensor, found: Tensor) -> float:
    """Agreement of two groupings over pairs, 0 by chance and 1 where they are the same."""
    t, f = truth.unique(return_inverse=True)[1], found.unique(return_inverse=True)[1]
    table = torch.zeros(int(t.max()) + 1, int(f.max()) + 1, dtype=torch.float64)
    table.index_put_((t, f), torch.ones(len(t), dtype=torch.float64), accumulate=True)
    pairs = lambda n: float((n * (n - 1) / 2).sum())
    both, of_t, of_f = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = of_t * of_f / max(1, len(t) * (len(t) - 1) / 2)
    most = (of_t + of_f) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def fired_together(rm: ReplacementModel, world: World, count: int) -> Together:
    """What features did on questions that the world was trained on, with their answers."""
    asked = world.questions(split="train") + world.questions(split="train", kind="fact")
    together = Together(rm.transcoder.n_layers, 10**9)
    for question in random.Random(5).sample(asked, min(count, len(asked))):
        tokens = torch.tensor([world.tokens(question) + world.answer_tokens(question)])
        for l, acts in enumerate(rm.features(rm.clean(tokens))):
            together.update(l, acts[0, 1:])
    return together


def concepts(graph: Graph, labels, world: World, question: Question, holding: bool) -> dict[int, str]:
    """Feature -> the concept that it is named after, with its position."""
    holds, found = world.labels(question), {}
    for id in range(graph.n_features):
        node = graph.nodes[id]
        label = labels.label(node.layer, node.index)
        if label is not None and label.source == "truth":
            here = [name for name in label.concepts if name in holds[node.position]]
            if here or not holding:
                found[id] = f"{(here or [label.text])[0]} @{node.position}"
    return found


def compared(concept: dict[int, str], groups: dict[str, list[int]], state: str) -> tuple[float, list[bool]]:
    """The adjusted Rand index, and of each group of the state whether it was found."""
    of = {id: name for name, ids in groups.items() for id in ids}
    ids = list(concept)
    names = {name: number for number, name in enumerate(dict.fromkeys(concept.values()))}
    truth = torch.tensor([names[concept[id]] for id in ids])
    found = torch.tensor([list(groups).index(of[id]) if id in of else -1 - id for id in ids])
    told = []
    for name in names:
        members = {id for id in ids if concept[id] == name}
        if name.startswith(f"state: {state} @") and len(members) > 1:
            known = [set(group) & set(ids) for group in groups.values()]
            shares = [2 * len(members & group) / (len(members) + len(group)) for group in known]
            told.append(max(shares, default=0.0) >= 0.5)
    return adjusted_rand(truth, found), told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--node", type=float, default=0.9)
    parser.add_argument("--text", type=int, default=1500)
    parser.add_argument("--by", default=WAYS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rm = ReplacementModel.load(arguments.run)
    world = world_of(rm.lm)
    labels = label_features(rm, world)
    together = fired_together(rm, world, arguments.text)
    questions = random.Random(1).sample(world.questions("two_hop", arguments.split), arguments.questions)
    asked = []
    for question, right in zip(questions, world.correct(rm.lm, questions)):
        whole = rm.trace(question.prompt)
        small = whole.prune(arguments.node, 1.0)
        number = {key: id for id, key in enumerate(whole.nodes.keys())}
        back = [number[key] for key in small.nodes.keys()[: small.n_features]]
        asked.append((question, right, whole, small, back))
    for way in arguments.by.split(","):
        ari: dict[str, list[float]] = {"holds": [], "all": []}
        found: list[bool] = []
        scores, features = [], {"holds": [], "all": []}
        for question, right, whole, small, back in asked:
            nodes = [small.nodes[id] for id in range(small.n_features)]
            acts = together.of([(rm.transcoder.layers.index(node.layer), node.index) for node in nodes])
            groups = propose_supernodes(small, way.split("+"), transcoder=rm.transcoder, acts=acts)
            for kind, kept in ari.items():
                concept = concepts(small, labels, world, question, kind == "holds")
                features[kind].append(len(concept))
                if len(concept) > 1:
                    index, told = compared(concept, groups, question.facts["state"])
                    kept.append(index)
                    if kind == "holds":
                        found += told
            if right and groups:
                scores.append(judge_groups(rm, whole, {name: [back[id] for id in ids] for name, ids in groups.items()}))
        mean = lambda values: sum(values) / max(1, len(values))
        row = {"by": way, "graphs": len(ari["holds"]), "named": sum(features["all"]), "holding": sum(features["holds"])}
        row |= {f"ari {kind}": mean(values) for kind, values in ari.items()}
        row |= {"state groups": len(found), "found": mean(found)}
        row |= {name: mean([getattr(one, name) for one in scores]) for name in
                ("carried", "left", "left_matched", "kept", "kept_matched")}  # fmt: skip
        for name in ("replacement_score", "completeness"):
            row[f"{name} kept"] = mean([one.scores[name] / one.whole[name] for one in scores])
        shown = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(json.dumps(row) if arguments.json else "  ".join(shown), flush=True)


if __name__ == "__main__":
    main()
