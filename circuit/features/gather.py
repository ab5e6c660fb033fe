"""Feature dashboards: one pass over a corpus, then one record a feature.

    sequences [S, T] --lm--> read [S, T, D] a layer --encode--> activations [S, T, F]      (gather)
    activations --> per feature its strongest tokens, a sample, counts                     (examples)
    examples + direct logits --> one record a feature --> features/layer_{i}.bin           (layer_records, dashboards)

The model runs over whole sequences, because an example needs the text around it (a store's rows are shuffled). Per
layer the pass keeps each feature's strongest tokens, a uniform sample of the tokens it fires on, and counts; memory is
bounded by features x examples x window, whatever the length of the text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...data.errors import Progress, UserError, check_range, silent
from ...data.models import LanguageModel
from ...train.parallel import SINGLE, Collectives
from ...train.transcoder import Transcoder
from ..graph import Graph
from ..replacement import LocalModel
from .dashboards import DashboardWriter, Record
from .examples import Keeper, LayerExamples
from .global_weights import GlobalWeights, Together, find_neighbours
from .labels import Label, Labels, label_from_record

LARGEST_BATCH = 2**24  # activations of one layer at once: 64 MiB in float32
LOGIT_CHUNK = 2**26  # logits at once


@dataclass(frozen=True)
class FeatureSettings:
    tokens: int = 1_000_000
    """How many tokens of the corpus to read."""

    split: str = "train"
    """Which part of the corpus: train or held_out."""

    top: int = 12
    """Strongest examples kept of each feature."""

    quantiles: int = 4
    """Groups of further examples, from weak to strong activations."""

    per_quantile: int = 4
    """Examples in each group."""

    before: int = 20
    """Tokens shown before an example's token."""

    after: int = 8
    """Tokens shown after it."""

    logits: int = 10
    """How many tokens are listed that a feature makes likelier, and as many that it makes less likely."""

    neighbours: int = 10
    """Features listed that drive a feature on every prompt, and that it drives; 0 for none."""

    together: int = 20_000
    """Tokens of the text on which it is counted which features fire together, for these lists."""

    layers: list[int] | None = None
    """Layers of the model to describe; all that the transcoder covers by default."""

    layers_at_once: int = 0
    """Layers described in one pass over the text, 0 for all: fewer take less memory, and less is lost when stopped."""

    seed: int = 0
    """Decides which further examples are drawn."""

    def __post_init__(self) -> None:
        for name, low in (("tokens", 1), ("top", 1), ("quantiles", 0), ("per_quantile", 1), ("logits", 0),
                          ("neighbours", 0), ("together", 1), ("layers_at_once", 0)):  # fmt: skip
            check_range(f"features.{name}", getattr(self, name), low=low)
        for name in ("before", "after"):
            check_range(f"features.{name}", getattr(self, name), low=0, high=1024)


class Sequences(Protocol):
    """A corpus, as far as it is needed here."""

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator: ...


def build_features(
    model: LocalModel,
    corpus: Sequences,
    run: str | Path,
    settings: FeatureSettings = FeatureSettings(),
    progress: Progress = silent,
    comm: Collectives = SINGLE,
) -> Path:
    """Write `features/` of a run: packed dashboards, their index, and labels for features that have none.

    Layers that an earlier call with these settings has written stay. Processes share the layers; each reads the text.
    """
    layers = model.transcoder.layers if settings.layers is None else settings.layers
    if missing := sorted(set(layers) - set(model.transcoder.layers)):
        raise UserError(f"features.layers names {missing}, which the transcoder does not cover")
    folder = Path(run) / "features"
    writer = DashboardWriter(folder, model.lm.n_layers)
    mine = [layer for layer in layers[comm.data_rank :: comm.data_ranks] if not writer.written(layer)]
    together = Together(model.transcoder.n_layers, settings.together) if settings.neighbours and mine else None
    weights, at_once = None, settings.layers_at_once or max(1, len(mine))
    for start in range(0, len(mine), at_once):
        some, texts = mine[start : start + at_once], []
        sequences = corpus.sequences(settings.split, settings.tokens)
        examples = gather_examples(model, sequences, some, settings, texts, progress, together)
        if together is not None and weights is None:
            weights = find_neighbours(model.transcoder, together, settings.neighbours, model.lm, progress)
        for number, layer in enumerate(some):
            guesses: dict[str, dict[str, str]] = {"guesses": {}}
            records = layer_records(model, layer, examples[layer], texts, settings, weights)
            writer.write_layer(layer, _guessed(records, guesses["guesses"]), guesses)
            progress("writing dashboards", start + number + 1, len(mine))
    comm.barrier()
    if comm.is_main:
        labels = Labels.load(run)
        for layer, notes in writer.close().items():
            for feature, text in notes["guesses"].items():
                labels.set(layer, int(feature), Label(text, "tokens"))
        labels.save(run)
    comm.barrier()
    return folder


def _guessed(records: Iterable[Record], guesses: dict[str, str]) -> Iterator[Record]:
    """The records, and on the way a name for each from its tokens."""
    for record in records:
        guess = label_from_record(record)
        if guess is not None:
            guesses[str(record["index"])] = guess.text
        yield record


# --- the pass over the text -----------------------------------------------------------------------------------


@torch.no_grad()
def gather_examples(
    model: LocalModel | Any,
    sequences: Iterable,
    layers: Sequence[int],
    settings: FeatureSettings,
    texts: list[Tensor],
    progress: Progress = silent,
    together: Together | None = None,
) -> dict[int, LayerExamples]:
    """What the features of each layer did; `texts` receives the tokens of every sequence that was read, `together` what
    all layers did on the first of them.

    `model` may be a model with another dictionary in the transcoder's place.
    """
    transcoder = model.transcoder
    examples = {
        layer: LayerExamples(
            transcoder.features[transcoder.layers.index(layer)],
            settings.top,
            settings.quantiles * settings.per_quantile,
            settings.before,
            settings.after,
            model.lm.device,
            settings.seed + layer,
        )
        for layer in layers
    }
    read = transcoder.settings.read
    done = 0
    for batch in _batches(sequences, max(transcoder.features)):
        tokens_ST, valid_ST = padded(batch, model.lm.device)
        with model.lm.capture({read, *model.sinks.limits}) as sites:
            model.lm.run(tokens_ST)
        counted_ST = valid_ST & ~model.masked_positions(tokens_ST, sites=sites)
        number_S = torch.arange(len(texts), len(texts) + len(batch), device=model.lm.device)
        compared = together is not None and not together.full
        for l, layer in enumerate(transcoder.layers):
            if layer not in examples and not compared:
                continue
            acts_STF = transcoder.encode_layer(getattr(sites, read)[layer].to(transcoder.dtype), l)
            if together is not None and compared:
                together.update(l, acts_STF[counted_ST])
            if layer in examples:
                examples[layer].update(acts_STF, counted_ST, number_S)
        texts += [tokens.to(torch.int32) for tokens in batch]
        done += int(valid_ST.sum())
        progress("reading text", min(done, settings.tokens), settings.tokens)
    if done == 0:
        raise UserError(f"the corpus has no text in its {settings.split} part; choose another with features.split")
    return examples


def _batches(sequences: Iterable, features: int) -> Iterator[list[Tensor]]:
    """Sequences in batches that fit memory. A text that came before is left out: it would fill the examples."""
    batch: list[Tensor] = []
    longest, seen = 0, set()
    for sequence in sequences:
        tokens = torch.as_tensor(sequence.tokens)
        key = tokens.to(torch.int32).numpy().tobytes()
        if len(tokens) == 0 or key in seen:
            continue
        seen.add(key)
        longest = max(longest, len(tokens))
        if batch and (len(batch) + 1) * longest * features > LARGEST_BATCH:
            yield batch
            batch, longest = [], len(tokens)
        batch.append(tokens)
    if batch:
        yield batch


def padded(batch: Sequence[Tensor], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Tokens [S, T] filled up at their ends, where causal attention does not look, and which of them are text."""
    lengths = torch.tensor([len(tokens) for tokens in batch])
    tokens_ST = torch.nn.utils.rnn.pad_sequence([tokens.long() for tokens in batch], batch_first=True)
    valid_ST = torch.arange(tokens_ST.shape[1])[None] < lengths[:, None]
    return tokens_ST.to(device), valid_ST.to(device)


# --- records ------------------------------------------------------------------------------------------------


def layer_records(
    model: LocalModel,
    layer: int,
    examples: LayerExamples,
    texts: Sequence[Tensor],
    settings: FeatureSettings,
    weights: GlobalWeights | None = None,
) -> Iterator[Record]:
    """The record of every feature of a layer, in order."""
    words = Words(model.lm)
    shares = [i / max(1, settings.quantiles) for i in range(settings.quantiles + 1)]
    quantiles = examples.histogram.quantiles(shares).tolist()
    density, counts = examples.density.tolist(), examples.histogram.counts.tolist()
    least, most = examples.histogram.least.tolist(), examples.histogram.most.tolist()
    alive = torch.nonzero(examples.fired).squeeze(1)
    top, bottom = _logit_words(model, layer, alive, settings.logits, words)
    strongest, sampled = Kept(examples.top), Kept(examples.sampled)
    for feature in range(len(density)):
        groups = []
        if density[feature]:
            groups.append(_group("Top activations", strongest, feature, strongest.order(feature), texts, words))
            groups += _quantile_groups(sampled, feature, settings, texts, words)
        yield {
            "index": feature,
            "examples_quantiles": groups,
            "top_logits": top.get(feature, []),
            "bottom_logits": bottom.get(feature, []),
            "act_min": _rounded(least[feature]) if density[feature] else 0.0,
            "act_max": _rounded(most[feature]),
            "histogram": counts[feature],
            "quantile_values": [_rounded(value) for value in quantiles[feature]],
            "activation_frequency": density[feature],
            **({} if weights is None else _neighbours(weights, layer, feature)),
        }


def _neighbours(weights: GlobalWeights, layer: int, feature: int) -> Record:
    """`inputs` and `outputs`: [layer, feature, TWERA, virtual weight] each."""
    return {
        side: [[near.layer, near.feature, _rounded(near.twera), _rounded(near.virtual)] for near in found]
        for side, found in weights.of(layer, feature).items()
    }


class Kept:
    """A keeper's examples on the CPU, for reading one feature after the other."""

    def __init__(self, keeper: Keeper):
        self.before = keeper.before
        self.sequence, self.token = keeper.sequence.cpu(), keeper.token.cpu()
        self.window, self.score = keeper.window.cpu(), keeper.score.cpu()

    def order(self, feature: int) -> list[int]:
        """Its examples, the strongest first."""
        peak = self.window[feature, :, self.before]
        found = self.score[feature] > -torch.inf
        return [i for i in peak.argsort(descending=True).tolist() if bool(found[i])]


class Words:
    """Tokens as texts, each worked out once."""

    def __init__(self, lm: LanguageModel):
        self.lm, self.known = lm, {}

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        if missing := [token for token in tokens if token not in self.known]:
            self.known |= dict(zip(missing, self.lm.token_strings(missing), strict=True))
        return [self.known[token] for token in tokens]


def _quantile_groups(
    kept: Kept, feature: int, settings: FeatureSettings, texts: Sequence[Tensor], words: Words
) -> list[Record]:
    """The sample by rank: the strongest part of it, the next ... so that each group stands for a part of the range."""
    order = kept.order(feature)
    groups = []
    for i in range(settings.quantiles):
        part = order[i * len(order) // settings.quantiles : (i + 1) * len(order) // settings.quantiles]
        if part:
            high, low = 100 - 100 * i // settings.quantiles, 100 - 100 * (i + 1) // settings.quantiles
            groups.append(_group(f"Quantile {low}–{high}%", kept, feature, part, texts, words))
    return groups


def _group(name: str, kept: Kept, feature: int, places: Sequence[int], texts: Sequence[Tensor], words: Words) -> Record:
    seen: set[tuple[int, ...]] = set()
    examples = []
    for place in places:
        text, at = texts[int(kept.sequence[feature, place])], int(kept.token[feature, place])
        start = max(0, at - kept.before)
        end = min(len(text), at - kept.before + kept.window.shape[-1])
        tokens = text[start:end].tolist()
        acts = kept.window[feature, place, start - at + kept.before : end - at + kept.before]
        examples.append(
            {
                "tokens": words(tokens),
                "tokens_acts_list": [_rounded(value) for value in acts.tolist()],
                "train_token_ind": at - start,
                "is_repeated_datapoint": tuple(tokens) in seen,
            }
        )
        seen.add(tuple(tokens))
    return {"quantile_name": name, "examples": examples}


def _rounded(value: float) -> float:
    """Four figures: a dashboard is looked at, and its size counts."""
    return float(f"{value:.4g}")


def _logit_words(
    model: LocalModel, layer: int, features: Tensor, count: int, words: Words
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    top: dict[int, list[str]] = {}
    bottom: dict[int, list[str]] = {}
    if count == 0:
        return top, bottom
    for part in features.split(max(1, LOGIT_CHUNK // model.lm.d_vocab)):
        logits = direct_logits(model.lm, model.transcoder, layer, part)
        count = min(count, logits.shape[1])
        for found, sign in ((top, 1), (bottom, -1)):
            tokens = (sign * logits).topk(count, dim=1).indices.tolist()
            found |= {f: words(row) for f, row in zip(part.tolist(), tokens, strict=True)}
    return top, bottom


def name_by_tokens(graph: Graph, model: LocalModel, most: int = 40, tokens: int = 3) -> None:
    """Name the most influential features that have no label by the tokens that they make likelier."""
    influence, nodes = graph.influence(), graph.nodes
    bare = [id for id in nodes.ids("feature") if id not in nodes.labels]
    for id in sorted(bare, key=lambda id: -float(influence[id]))[:most]:
        node = nodes[id]
        logits = direct_logits(model.lm, model.transcoder, node.layer, torch.tensor([node.index]))[0]
        words = model.lm.token_strings(logits.topk(min(tokens, len(logits))).indices)
        nodes.labels[id] = f"L{node.layer}:{node.index} says " + " ".join(map(repr, words))


@torch.no_grad()
def direct_logits(lm: LanguageModel, transcoder: Transcoder, layer: int, features: Tensor) -> Tensor:
    """[N, V]: what one unit of each feature of a model layer adds to the logits directly, up to the last norm's scale.

    A feature's decoder is summed over all layers it writes to; the last norm's weight is folded into the unembedding.
    """
    l = transcoder.layers.index(layer)
    written_ND = transcoder.W_dec[l][features].sum(1)
    read_ND = lm.final_norm.centred(written_ND.to(lm.dtype)) * lm.final_norm.weight
    logits_NV = read_ND.to(lm.W_U.dtype) @ lm.W_U.T
    return logits_NV - logits_NV.mean(1, keepdim=True)
