"""Whether a graph names the heads that fetch a word on the bundled world, and says why they look there.

    python -m benchmarks.attention.world RUN [--questions 100] [--json]

Of the held-out two-hop questions that the model answers, the last position's looks at the city's pieces are asked
about. The graph names heads: those of one layer, the fewest that carry 90% of what its strongest edges bring from the
pieces to the last position through that layer. They are held against the model itself, all else live:

- `found`: the layer is the costliest, its named heads are sufficient, and why they look is said rightly;
- `costliest`: cutting the layer's looks at the city costs the answer more than cutting any other layer's;
- `sufficient`: with the looks of all other heads of the model cut, the answer is still the first choice;
- `necessary`: with the named heads' looks cut, more than half is lost of what cutting every head's look costs (later
  layers may make good what the first one no longer brings);
- `random`: the last two of as many other heads, drawn at random;
- `why`: of each named head that looks at the city most, the strongest pair behind its look joins the token at the last
  position, where the question ends, with the piece of the city that it looks at; and without that token the head's look
  leaves that piece more than without any other source on the query's side.
"""

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from crosslace.circuit.attribution import edge_heads, rank_heads
from crosslace.circuit.graph import Graph
from crosslace.circuit.model import ReplacementModel
from crosslace.data.models import LanguageModel
from crosslace.launch.known_world.circuits import city_positions
from crosslace.launch.workspace import world_of
from torch import Tensor

CARRIED = 0.9
EDGES = 60


@contextmanager
def cut(lm: LanguageModel, looks: Tensor, query: int, keys: list[int]) -> Iterator[None]:
    """Heads `looks` [n, L, H], a row of the batch each, bring nothing from `keys` to `query`."""
    number = {id(parts.attn): layer for layer, parts in enumerate(lm.layers)}

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        eager = import_module(type(module).__module__).eager_attention_forward
        pattern = eager(module, q, k, v, mask, **kwargs)[1].clone()
        stays = ~looks[:, number[id(module)], None]
        pattern[:, :, query, keys] *= stays.transpose(1, 2)
        return (pattern @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2).contiguous(), pattern

    with lm.attend_with(attention):
        yield


def costs(lm: LanguageModel, tokens: Tensor, looks: Tensor, keys: list[int], answer: int) -> tuple[Tensor, Tensor]:
    """What each row of cut looks takes off the answer's logarithm, and whether it stays the first choice."""
    query = len(tokens) - 1
    with torch.no_grad(), cut(lm, looks, query, keys):
        said = lm(tokens.expand(len(looks), -1))[:, query].log_softmax(-1)
    clean = lm(tokens[None])[0, query].log_softmax(-1)[answer]
    return clean - said[:, answer], said.argmax(-1) == answer


def named_heads(rm: ReplacementModel, graph: Graph, keys: list[int]) -> tuple[int, list[int]]:
    """The layer, and the fewest of its heads, that carry what comes from these tokens to the last position."""
    sources = [id for key in keys for id in graph.nodes.ids("embedding", position=key)]
    last = (graph.nodes.position[graph.row_ids] == len(graph.tokens) - 1).nonzero().squeeze(1)
    size = graph.rows[last][:, sources].abs() * graph.influence_per_input[last, None]
    best = size.flatten().topk(min(EDGES, int((size > 0).sum()))).indices.tolist()
    rows = [int(last[place // len(sources)]) for place in best]
    edges = [(int(graph.row_ids[row]), sources[place % len(sources)]) for row, place in zip(rows, best)]
    ranked = rank_heads(edge_heads(rm, graph, edges), graph.influence_per_input[rows].tolist())
    same = [head for head in ranked if head.layer == ranked[0].layer]
    named, total = [], sum(head.absolute for head in same)
    for head in same:
        named.append(head.head)
        if sum(head.absolute for head in same[: len(named)]) >= CARRIED * total:
            break
    return ranked[0].layer, named


def explained(rm: ReplacementModel, tokens: list[int], layer: int, head: int, keys: list[int]) -> bool | None:
    """Whether a head's look at the city is put down to the last token and the piece; None of a head whose most
    attended key is not of the city."""
    looked = rm.attention(tokens, layer, head, most_keys=1)
    key = looked.explained[0]
    if key not in keys:
        return None
    pair, nodes = looked.strongest_pairs(count=1)[0], looked.nodes
    place = lambda id: (nodes[id].kind, nodes[id].position)
    last = ("embedding", len(tokens) - 1)
    if (place(pair.query), place(pair.key)) != (last, ("embedding", key)):
        return False
    of_query = [one for one in looked.silenced() if nodes[one.source].position == len(tokens) - 1]
    return place(min(of_query, key=lambda one: one.exact).source) == last


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rm = ReplacementModel.load(arguments.run)
    world, draw = world_of(rm.lm), random.Random(0)
    questions = draw.sample(world.questions("two_hop", "held_out"), arguments.questions)
    L, H = rm.lm.n_layers, rm.lm.layers[0].n_heads
    names = ("found", "costliest", "sufficient", "why", "necessary", "random sufficient", "random necessary")
    counts, sizes, layers = dict.fromkeys(names, 0), [], []
    answered = 0
    for question, known in zip(questions, world.correct(rm.lm, questions)):
        if not known:
            continue
        answered += 1
        tokens, keys = rm.lm.tokenize(question.prompt), city_positions(world, question)
        layer, heads = named_heads(rm, rm.trace(question.prompt, max_nodes=2000), keys)
        named = torch.zeros(L, H, dtype=torch.bool)
        named[layer, heads] = True
        others = draw.sample((~named).flatten().nonzero().flatten().tolist(), len(heads))
        control = torch.zeros(L * H, dtype=torch.bool)
        control[others] = True
        by_layer = torch.eye(L, dtype=torch.bool)[:, :, None].expand(L, L, H)
        sets = torch.stack([torch.ones_like(named), named, ~named, control.view(L, H), ~control.view(L, H)])
        cost, kept = costs(rm.lm, tokens, torch.cat([sets, by_layer]), keys, world.answer_tokens(question)[0])
        told = [explained(rm, tokens.tolist(), layer, head, keys) for head in heads]
        right = {
            "costliest": int(cost[5:].argmax()) == layer,
            "sufficient": bool(kept[2]),
            "why": any(told) and all(one is not False for one in told),
            "necessary": bool(cost[1] > cost[0] / 2),
            "random sufficient": bool(kept[4]),
            "random necessary": bool(cost[3] > cost[0] / 2),
        }
        right["found"] = right["costliest"] and right["sufficient"] and right["why"]
        for name in names:
            counts[name] += right[name]
        sizes.append(len(heads))
        layers.append(layer)
    result = {"answered": answered, **counts, "heads named": sum(sizes) / answered}
    result["layers named"] = {str(layer): layers.count(layer) for layer in sorted(set(layers))}
    print(json.dumps(result) if arguments.json else "\n".join(f"{k:18} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
