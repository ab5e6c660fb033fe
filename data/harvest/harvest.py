"""Runs the model over a corpus once and keeps what its layers read and write.

    sequences [T] -> passes, tokens [B, T] -> sites, by layer [B, T, D] -> rows [N, L, D] of a window -> its shards

1. The plan (`window_plan.py`): which sequences fill which window of rows; windows fall to processes in turn.
2. A sample: where norms part into words and sinks, which dtype holds the largest value, for int8 each channel's size.
3. For each window: forward passes of a token budget, and behind them a thread that takes each pass's sites, drops the
   masked positions, sums the statistics and copies the rows off the device while the next pass computes.
4. A full window is shuffled and written (`store/writer.py`) while the next one fills.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ..errors import Progress, SettingsError, UserError, silent
from ..models import SITES_LOOKED_AT, InputNorms, LanguageModel, SinkRule, row_norms
from ..store import (
    COLUMNS,
    FLOAT16_MAX,
    HELD_OUT,
    StoreWriter,
    Window,
    channel_scale,
)
from ..text import TokenSequence, tokenizer_fingerprint
from ..units import format_bytes
from .behind import Behind, ahead
from .settings import HarvestSettings, Weight, make_layout, weigh
from .window_plan import PlannedWindow, Sampling, Text, batches, plan_windows

_WELL_WITHIN = 8  # how many times the sample's largest value float16 must hold, to be chosen


class Harvester:
    """A model, a corpus and the settings that say which of its activations are kept."""

    def __init__(self, lm: LanguageModel, corpus: Text, settings: HarvestSettings):
        self.lm, self.corpus, self.settings = lm, corpus, settings
        self.layout = make_layout(settings, lm.n_layers, lm.d_model, lm.dtype)
        self.rule = SinkRule(lm.bos, settings.sinks)
        self.sampling = Sampling(self.rule, settings.fraction, settings.seed)
        self.margin = 0.0
        self.channel_scale: dict[str, Tensor] = {}
        self.sampled: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of the store, beside its layout."""
        lm, settings = self.lm, self.settings
        names = ("fraction", "sinks", "sample_tokens", "batch_tokens", "shuffle_rows")
        return {
            "model": {
                "name": PurePath(lm.name).name if PurePath(lm.name).is_absolute() else lm.name,
                "revision": lm.revision,
                "fingerprint": lm.fingerprint,
                "family": lm.family,
                "dtype": str(lm.dtype).removeprefix("torch."),
            },
            "tokenizer": {"name": type(lm.tokenizer).__name__, "fingerprint": tokenizer_fingerprint(lm.tokenizer)},
            "dataset": {"fingerprint": self.corpus.fingerprint},
            "seed": settings.seed,
            "settings": {name: value for name, value in asdict(settings).items() if name in names},
        }

    def attributes(self) -> dict[str, Any]:
        """What the sample told."""
        kept = {name: value for name, value in self.sampled.items() if name != "channel_scale"}
        return {
            "masked": self.rule.to_attributes(),
            "input_norms": InputNorms.of(self.lm, self.layout.layers).to_attributes(),
            "largest_in_sample": self.sampled["largest"],
            "sample": kept,
        }

    # -- the sample ----------------------------------------------------------------------------------------------

    def sample(self) -> dict[str, Any]:
        """What the first training tokens tell: limits between words and sinks, the share of sinks, the largest value
        of each site and the dtype that holds it, the size of each channel."""
        norms = {site: {layer: [] for layer in self.layout.layers} for site in SITES_LOOKED_AT}
        rows: dict[str, list[Tensor]] = {site: [] for site in self.layout.sites}
        largest = dict.fromkeys(self.layout.sites, 0.0)
        sequences = list(enumerate(self.corpus.sequences("train", limit_tokens=self.settings.sample_tokens)))
        if not sequences:
            raise UserError("the dataset has no text to train on: check dataset.name, dataset.split and dataset.column")
        for group in batches(sequences, self.settings.batch_tokens, self.settings.seed):
            sites, _, candidates = self._forward(group)
            for site, by_layer in norms.items():
                for layer, values in by_layer.items():
                    values.append(row_norms(sites[site][layer][candidates]).cpu())
            for site in self.layout.sites:
                chosen = self._rows(sites[site], candidates.flatten().nonzero()[:, 0])
                if len(chosen):
                    largest[site] = max(largest[site], float(chosen.abs().amax()))
                if self.layout.dtype == "int8":
                    rows[site].append(chosen.float().cpu())
        joined = {site: {layer: torch.cat(parts) for layer, parts in by.items()} for site, by in norms.items()}
        if not all(len(norm) and norm.isfinite().all() for by_layer in joined.values() for norm in by_layer.values()):
            raise UserError(
                "the sample has no usable activations: raise store.sample_tokens, or set model.dtype=float32"
            )
        rule = self.rule.learned(joined)
        large = rule.large(joined)
        large = torch.zeros(rule.rows, dtype=torch.bool) if large is None else large
        scales = {site: channel_scale(torch.cat(parts)[~large]).tolist() for site, parts in rows.items() if parts}
        return {
            "masked": rule.to_attributes(),
            "sink_share": large.float().mean().item(),
            "largest": largest,
            "dtype": self._choose_dtype(max(largest.values())),
            "channel_scale": scales,
        }

    def _choose_dtype(self, largest: float) -> str:
        """float16 keeps three more bits of every number; bfloat16 has room for any."""
        if self.settings.dtype != "auto" or self.lm.dtype == torch.bfloat16:
            return self.layout.dtype
        return "float16" if largest <= FLOAT16_MAX / _WELL_WITHIN else "bfloat16"

    def take_sample(self, writer: StoreWriter) -> None:
        """Sample the text, unless another process or an earlier run has."""
        self.learn(writer.agree("sample", self.sample))
        writer.settle(self.layout)
        writer.channel_scale = self.channel_scale

    def learn(self, sample: dict[str, Any]) -> None:
        """Take over what a sample told: this process's, or the one that came first."""
        self.sampled = sample
        self.rule = SinkRule.from_attributes(sample["masked"])
        self.layout = replace(self.layout, dtype=sample["dtype"])
        self.margin = 0.01 + 3 * sample["sink_share"]
        self.channel_scale = {site: torch.tensor(scale) for site, scale in sample["channel_scale"].items()}

    # -- windows -------------------------------------------------------------------------------------------------

    def windows(self, split: str, sizes: list[list[int]]) -> Iterator[PlannedWindow]:
        """The windows of a split, in order, each tokenized and planned while the one before is harvested."""
        if any(sizes):
            yield from ahead(plan_windows(self.corpus.sequences(split), self.sampling, sizes, self.margin))

    def fill(self, planned: PlannedWindow, window: Window, progress: Callable[[int], None] = lambda rows: None) -> None:
        """Run the model over a window's sequences."""
        with closing(Behind(self.lm.device)) as behind:
            for group in batches(planned.sequences, self.settings.batch_tokens, self.settings.seed, planned.index):
                sites, tokens, candidates = self._forward(group)
                behind.do(self._keep, window, group, sites, tokens, candidates)
                progress(window.filled)
            behind.wait()
        progress(window.filled)

    def _forward(self, group: list[tuple[int, TokenSequence]]) -> tuple[dict[str, dict[int, Tensor]], Tensor, Tensor]:
        """One pass: every site by layer [B, T, D], tokens [B, T], and which positions may become rows [B, T]."""
        lm = self.lm
        length = max(len(sequence.tokens) for _, sequence in group)
        if length > lm.context_length:
            raise SettingsError(
                f"a sequence of {length} tokens is more than the model's context, {lm.context_length}: lower "
                "dataset.sequence_length"
            )
        tokens = torch.zeros(len(group), length, dtype=torch.long)
        candidates = torch.zeros(len(group), length, dtype=torch.bool)
        for row, (number, sequence) in enumerate(group):
            # padding stands to the right, where no causal model sees it
            tokens[row, : len(sequence.tokens)] = sequence.tokens
            candidates[row, : len(sequence.tokens)] = self.sampling.candidates(sequence.tokens, number)
        tokens, candidates = tokens.to(lm.device), candidates.to(lm.device)
        wanted = tuple(dict.fromkeys((*SITES_LOOKED_AT, *self.layout.sites)))
        with torch.inference_mode(), lm.capture(wanted, self.layout.layers) as captured:
            lm.run(tokens)
        return {site: getattr(captured, site) for site in wanted}, tokens, candidates

    @torch.inference_mode()
    def _keep(
        self,
        window: Window,
        group: list[tuple[int, TokenSequence]],
        sites: dict[str, dict[int, Tensor]],
        tokens: Tensor,
        candidates: Tensor,
    ) -> None:
        """The rows of one pass, into the window."""
        norms = self.rule.norms(sites)
        large = self.rule.large(norms)
        sinks = torch.zeros_like(candidates) if large is None else large & candidates
        counts = {"sink": int(sinks.sum())}
        if counts["sink"]:
            counts |= {f"sink.{place}": count for place, count in self.rule.places(norms, sinks).items()}
            words = Counter(self.lm.token_strings(tokens[sinks].tolist()))
            counts |= {f"sink.token.{word!r}": n for word, n in words.items()}
        beyond = self._beyond_range(sites, norms) & candidates & ~sinks
        counts["beyond_range"] = int(beyond.sum())
        chosen = (candidates & ~sinks & ~beyond).flatten().nonzero()[:, 0]
        for number, sequence in group:
            for reason, mask in self.sampling.masks(sequence.tokens, number).items():
                counts[reason] = counts.get(reason, 0) + int(mask.sum())
        counts["unused"] = max(0, len(chosen) - (window.rows - window.filled))
        chosen = chosen[: window.rows - window.filled]
        documents = torch.zeros(tokens.shape, dtype=torch.long)
        for row, (_, sequence) in enumerate(group):
            documents[row, : len(sequence.document)] = sequence.document
        columns = (tokens.flatten()[chosen], chosen % tokens.shape[1], documents.flatten()[chosen.cpu()])
        kept = {site: self._rows(sites[site], chosen) for site in self.layout.sites}
        window.append(kept, dict(zip(COLUMNS, columns)), counts)

    def _beyond_range(self, sites: dict[str, dict[int, Tensor]], norms: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        """[B, T] rows that the dtype which was chosen from the sample may have no numbers for; some norms are known."""
        found = torch.zeros(sites["resid"][self.layout.layers[0]].shape[:2], dtype=torch.bool, device=self.lm.device)
        if self.settings.dtype == "auto" and self.layout.dtype == "float16":
            for site in self.layout.sites:
                for layer in self.layout.layers:
                    known = norms.get(site, {}).get(layer)
                    found |= (row_norms(sites[site][layer]) if known is None else known) > FLOAT16_MAX
        return found

    def _rows(self, by_layer: dict[int, Tensor], chosen: Tensor) -> Tensor:
        """Chosen rows [N, L, D] of a site's tensors [B, T, D]."""
        first = by_layer[self.layout.layers[0]]
        rows = first.new_empty(len(chosen), len(self.layout.layers), first.shape[-1])
        for place, layer in enumerate(self.layout.layers):
            rows[:, place] = by_layer[layer].flatten(0, 1)[chosen]
        return rows


def harvest(
    lm: LanguageModel,
    corpus: Text,
    settings: HarvestSettings,
    progress: Progress = silent,
    process_index: int = 0,
    process_count: int = 1,
) -> bool:
    """Write the store at `settings.path`, or this process's share of it; True when the store is whole.

    Run again with the same settings, it goes on where it stopped, and ends at once if the store is whole.
    """
    if not settings.path:
        raise SettingsError("store.path is not set; it takes the folder that the store is to be in")
    if settings.mode != "disk":
        raise SettingsError(
            "store.mode=streaming has nothing to cache beforehand: train with it, or keep all with store.mode=disk"
        )
    harvester = Harvester(lm, corpus, settings)
    with open_writer(harvester, settings.path, process_index, process_count) as writer:
        if writer.complete:
            return True
        _refuse_if_too_large(weigh(harvester.layout, settings, process_count), settings, progress)
        harvester.take_sample(writer)
        windows = {}
        for split in (HELD_OUT, "train"):
            count = cache_split(harvester, writer, split, split, progress)
            if count:
                windows[split] = count
        if "train" not in windows:
            raise UserError("the dataset has no text to train on: check dataset.name, dataset.split and dataset.column")
        return writer.finish(windows, harvester.attributes())


def open_writer(
    harvester: Harvester, path: str, process_index: int, process_count: int, held_out_only: bool = False
) -> StoreWriter:
    """The writer of a harvest's store; with `held_out_only` the held-out rows are all that it is to hold."""
    settings = harvester.settings
    rows = {"train": settings.train_rows, HELD_OUT: settings.held_out_rows}
    return StoreWriter(
        path,
        harvester.layout,
        harvester.identity() | ({"split": HELD_OUT} if held_out_only else {}),
        {"train": rows[HELD_OUT]} if held_out_only else rows,
        settings.shuffle_rows,
        settings.memory_bytes(process_count),
        settings.scratch,
        process_index,
        process_count,
        dtype_open=settings.dtype == "auto",
        facts={"versions": versions(), "text": harvester.corpus.name},
    )


def cache_split(harvester: Harvester, writer: StoreWriter, split: str, into: str, progress: Progress) -> int:
    """Write this process's windows of a corpus' split into one of the store; the number of all its windows."""
    count = done = 0
    sizes = writer.sizes(into)
    total = sum(map(sum, sizes))
    label = "caching activations" if split == "train" else "caching held-out activations"
    for planned in harvester.windows(split, sizes):
        count += 1
        if writer.mine(planned.index) and not writer.done(into, planned.index):
            window = writer.window(into, planned.index, planned.rows)
            say = lambda rows, done=done, index=planned.index: progress(label, done + rows, total, f"window {index}")
            harvester.fill(planned, window, say)
            writer.write(into, planned.index, window)
        done += planned.rows
    if count:
        progress(label, total, total)
    return count


def _refuse_if_too_large(weight: Weight, settings: HarvestSettings, progress: Progress) -> None:
    """Say what the store will weigh; refuse what the disk cannot hold, rows that wait to be shuffled included."""
    note = f"the store will weigh {format_bytes(weight.store)}"
    if weight.free is not None:
        note += f", {format_bytes(weight.free)} are free"
    if not weight.fits:
        raise UserError(
            f"the store would weigh {format_bytes(weight.store)}, with {format_bytes(weight.spill)} of rows that wait "
            f"to be shuffled, and {settings.path} has room for {format_bytes(weight.free or 0)}: lower store.tokens, "
            "choose store.layers, store.dtype=int8 or store.mode=streaming"
        )
    progress("caching activations", 0, settings.train_rows, note)


def versions() -> dict[str, str]:
    """What made a store."""
    others = {name: metadata.version(name) for name in ("torch", "transformers", "zarr", "zarrs")}
    return {"crosslace": __version__} | others
