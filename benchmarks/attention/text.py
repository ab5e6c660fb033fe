"""What an explanation of a look predicts when a source is silenced, beside what happens, on real text.

    python -m benchmarks.attention.text RUN [--dataset general] [--passages 24] [--tokens 48] [--sources 24] [--json]

Each passage of the held-out text ends in a look: a random head, from the last token. The features among the sources
that its explanation names are silenced one by one, and the head's queries and keys are formed anew. Predicted are the
change of the score of the most attended key, and of the logarithm of its share: exactly for frozen norms (`score`,
`share`), and to first order (`first`). Measured with MLPs as they were and

- `frozen`: norms and attention below frozen (what is predicted: slope and correlation 1),
- `norms_live`: attention below frozen, `attention_live`: norms frozen, `clean_live`: both live,
- `all_live`: the MLPs answer too: the model itself.

Slope of measured on predicted with its 95% interval over passages, Pearson and Spearman.
"""

import argparse
import json
import random

import torch
from crosslace.circuit.attribution import Attention
from crosslace.circuit.judge.faithfulness import compare
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement import Intervention
from crosslace.data.models import listen
from crosslace.data.text import DatasetSettings, load_corpus

NORMS, PATTERNS = "norms", "attention"
MEASURED: dict[str, tuple[bool, list[str]]] = {
    "frozen": (True, [NORMS, PATTERNS]),
    "norms_live": (True, [PATTERNS]),
    "attention_live": (True, [NORMS]),
    "clean_live": (True, []),
    "all_live": (False, []),
}


def measured(rm: ReplacementModel, looked: Attention, groups: list, clean_mlps: bool, freeze: list[str]):
    """Change of the most attended key's score and of the logarithm of its share under each group, [n] each."""
    layer, head, key = looked.layer, looked.head, looked.explained[0]
    mlps = {range(rm.lm.n_layers): "clean" if clean_mlps else "model"}
    with listen(rm.lm, layer) as heard:
        rm.intervene_many(looked.tokens, groups, batch=len(groups), mlps=mlps, freeze=freeze)
    assert heard.called is not None
    args, kwargs = heard.called
    with torch.no_grad():  # what its norm gave in that run, a row a group: query and key norms are live here
        queries, keys = heard(args[0] if args else kwargs["hidden_states"])
    scores = torch.einsum("nd,nkd->nk", queries[:, head, looked.query], keys[:, heard.key_head(head)]) * heard.scale
    seen, column = looked.keys, looked.keys.tolist().index(key)
    scores = scores[:, seen]
    capped = heard.capped(scores)
    own = torch.cat([capped, heard.sinks[head].expand(len(capped), 1)], 1) if heard.sinks is not None else capped
    log_share = own.log_softmax(1)[:, column]
    return scores[:, column] - looked.scores[column], log_share - looked.pattern[column].log()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--dataset", default="general")
    parser.add_argument("--passages", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--sources", type=int, default=24)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rm = ReplacementModel.load(arguments.run)
    corpus = load_corpus(DatasetSettings(name=arguments.dataset), rm.lm.tokenizer)
    draw = random.Random(0)
    predicted: dict[str, list[torch.Tensor]] = {"score": [], "share": [], "first": []}
    found: dict[str, list[torch.Tensor]] = {f"{kind} {name}": [] for kind in ("score", "share") for name in MEASURED}
    passage: list[torch.Tensor] = []
    texts = (torch.as_tensor(one.tokens) for one in corpus.sequences("held_out"))
    for number, tokens in enumerate(text[: arguments.tokens] for text in texts if len(text) >= arguments.tokens):
        if number == arguments.passages:
            break
        layer, head = draw.randrange(1, rm.lm.n_layers), draw.randrange(rm.lm.layers[0].n_heads)
        looked = rm.attention(tokens.tolist(), layer, head, sources=arguments.sources)
        told = [one for one in looked.silenced() if looked.nodes[one.source].kind == "feature"]
        if not told:
            continue
        for name, values in (("score", 1), ("first", 2), ("share", 3)):
            predicted[name].append(torch.tensor([one[values] for one in told]))
        nodes = [looked.nodes[one.source] for one in told]
        groups = [[Intervention(node.layer, node.position, node.index, times=0.0)] for node in nodes]
        for name, how in MEASURED.items():
            score, share = measured(rm, looked, groups, *how)
            found[f"score {name}"].append(score)
            found[f"share {name}"].append(share)
        passage.append(torch.full((len(told),), number))
    which = torch.cat(passage)
    for name, values in found.items():
        kind = name.split()[0]
        for by in (kind, "first") if kind == "share" else (kind,):
            agreement = compare(torch.cat(predicted[by]), torch.cat(values), which)._asdict()
            row = {"run": arguments.run, "measured": name, "predicted": by, **agreement}
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            low, high = agreement["slope_interval"] or (None, None)
            shown = [agreement[key] for key in ("slope", "pearson", "spearman")]
            cells = " ".join(f"{'' if value is None else format(value, '.3f'):>9}" for value in (*shown, low, high))
            print(f"{name:22} by {by:6} {agreement['pairs']:6} {cells}", flush=True)


if __name__ == "__main__":
    main()
