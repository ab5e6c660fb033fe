"""What a training left, measured the same way for every program."""

from pathlib import Path
from typing import Any

import torch
from crosslace.circuit.formats import import_transcoder, open_foreign
from crosslace.circuit.judge.behaviour import (
    Condition,
    MeanSubstitute,
    TextBatch,
    ce_recovered,
    measure_behaviour,
    splice_condition,
)
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement import TranscoderOutput
from crosslace.train.run import ReconstructionMetrics
from crosslace.train.transcoder import Reading, Transcoder

from ..quality import Bench, batches

ROWS = 4096
SEQUENCES = 16


def load(program: str, out: Path, bench: Bench) -> Transcoder:
    """The transcoder, through `import` where a foreign program trained it."""
    if program == "crosslace":
        return Transcoder.load(out / "run" / "transcoder")
    return Transcoder.load(import_transcoder(open_foreign(out / "weights", program), out / "imported", bench.lm))


@torch.no_grad()
def figures(transcoder: Transcoder, bench: Bench, tokens: int) -> dict[str, Any]:
    """NMSE, FVU, L0 and dead on held-out rows; KL and CE recovered on held-out text with every MLP replaced."""
    metrics = ReconstructionMetrics(transcoder.features, transcoder.d_model)
    reading = Reading(bench.held_out, transcoder.settings.read, transcoder.layers)
    for rows in bench.held_out.rows_in_order(ROWS):
        x, y = reading.of(rows).float(), rows.mlp_out.float()
        acts = transcoder.encode(x)
        metrics.update(y, transcoder.decode(acts, x), acts)
    found = metrics.compute()
    lm, text, first = bench.lm, [], 0
    for tokens_BT, real_BT in batches(bench, tokens, SEQUENCES):
        counted_BT = torch.zeros_like(real_BT)
        counted_BT[:, :-1] = real_BT[:, 1:]
        text.append(TextBatch(tokens_BT, real_BT, counted_BT, first))
        first += len(tokens_BT)
    layers = transcoder.layers
    mean_LD = torch.zeros(lm.n_layers, lm.d_model)
    mean_LD[bench.train.layers] = bench.train.statistics.mean["mlp_out"].float()
    conditions = [
        splice_condition("mean", lm, MeanSubstitute(mean_LD), layers),
        Condition("replaced", lambda masked_BT: lm.overwrite(TranscoderOutput(transcoder, masked_BT))),
    ]
    sums = measure_behaviour(lm, text, conditions, ReplacementModel(lm, transcoder).masked_positions, first)
    clean, mean, ours = sums
    overall = found["overall"]
    return {
        **{name: overall[name] for name in ("nmse", "fvu", "l0", "dead")},
        "nmse_by_layer": [layer["nmse"] for layer in found["layers"]],
        "ce_recovered": ce_recovered(clean, mean, ours).value,
        "kl": float(ours[:, 2].sum() / ours[:, 0].sum()),
    }
