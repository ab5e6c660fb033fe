"""The training run, top to bottom: prepare, go on where a checkpoint stands, step, log, evaluate, save, export.

prepare      check everything; scales from the store's statistics; weights and biases   run/checks, transcoder, start
go on        weights, moments, averages, counters of the newest checkpoint              run/checkpoint
each step    rows [B, L, D] of this data rank, normalised so that E|x|^2 = D            data/store, transcoder
             one optimizer step                                                         step, loss, sparse, parallel
now and then the densities are looked at; dead features start again                     run/resampling
             a metric line; held-out figures; a checkpoint                              run/records, run/evaluation
the end      thresholds are calibrated, the scales folded into the weights, one folder  run/calibration, transcoder
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.device import find_device
from ..data.errors import Progress, UserError, out_of_room, silent
from ..data.store import ActivationStore, Batch
from .loss import Counters, RunningState
from .parallel import SINGLE, Collectives, whole_rows
from .run import (
    MOST_REWINDS,
    Checkpoints,
    Diverged,
    Evaluation,
    Guard,
    HeldOut,
    Optimizers,
    Records,
    StepParts,
    StopRequest,
    Tracker,
    check_run,
    check_same_run,
    eased,
    evaluate,
    store_identity,
    training_values,
)
from .settings import TOPK, TrainerSettings, TranscoderSettings
from .sparse import Workspace
from .start import FRESH_SHARE, Neurons, initialise, rows_for, start_from, start_from_neurons
from .step import look, objective_of, start_again, train_step
from .transcoder import Normalisation, Reading, Transcoder, new_part, own_slice, read_chosen, save_whole

# Steps between looks at the densities, which decide whether the sparse step and the auxiliary loss are worth it.
LOOK_EVERY = 25

# Non-finite losses or gradients in a row after which training stops.
MOST_BAD_STEPS = 5


class TrainResult(NamedTuple):
    """How a run ended."""

    status: str
    """finished, or interrupted (it was asked to stop, and saved)."""
    step: int
    folder: Path
    evaluation: dict[str, Any]
    """The last held-out figures: overall, layers, tokens; empty if interrupted before any."""
    message: str
    by_person: bool = False
    """Interrupted by Ctrl-C, not by a cluster that takes its machine back."""
    speed: Mapping[str, float] = MappingProxyType({})
    """This process's first_step_seconds, and tokens_per_second after it."""


class Trainer:
    """One run. Settings; parts; helpers; state."""

    def __init__(
        self,
        settings: TrainerSettings,
        transcoder_settings: TranscoderSettings,
        store: ActivationStore,
        held_out: ActivationStore,
        run_dir: str | Path,
        *,
        comm: Collectives = SINGLE,
        device: torch.device | str | None = None,
        trackers: Sequence[Tracker] = (),
        progress: Progress = silent,
        init: Transcoder | None = None,
        neurons: Iterable[Neurons] | None = None,
        meta: dict[str, Any] | None = None,
        token_name: Callable[[int], str] = str,
        behaviour: Callable[[Transcoder], dict[str, float]] | None = None,
    ) -> None:
        # Settings.
        settings = settings.begun_with(finished=init is not None, neurons=neurons is not None)
        transcoder_settings = read_chosen(transcoder_settings, store, init and init.settings.read)
        self.settings, self.transcoder_settings, self.comm = settings, transcoder_settings, comm
        self.device = torch.device(device) if device is not None else find_device(settings.device, "trainer.device")
        self.folder, self.progress, self.trackers = Path(run_dir), progress, list(trackers)
        self.layers = list(transcoder_settings.layers or store.layers)
        torch.backends.cuda.matmul.allow_tf32 = settings.precision == "tf32"
        check_run(settings, transcoder_settings, store, held_out, self.layers, self.device, comm)

        # Data.
        self.reading = Reading(store, transcoder_settings.read, self.layers)
        self.store = store.select(self.layers, (self.reading.site, "mlp_out"))
        self.normalisation = self.reading.normalisation(store)
        held = held_out.select(self.layers, (self.reading.site, "mlp_out"))
        self.identity = {"store": store_identity(store), "held_out": store_identity(held_out)}

        # Model, optimizer, state.
        self.meta = {"model": store.attributes.get("model", {}), **(meta or {})}
        self.targets = settings.per_layer("target_l0", len(self.layers))
        self.normalisation = self.normalisation.to(self.device)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", settings.keep_checkpoints, comm, settings.keep_every,
            background=self.device.type != "cpu",
        )  # fmt: skip
        self.found = self.checkpoints.newest()
        transcoder = self._new_transcoder(init)
        self.neurons = neurons
        self.held_out = HeldOut(held, self.normalisation, self.reading, self.layers, comm)
        target = None if self.targets is None else torch.tensor(self.targets, device=self.device)
        self.parts = StepParts(
            settings=settings,
            objective=objective_of(settings, transcoder),
            transcoder=transcoder,
            optimizers=Optimizers(transcoder, settings),
            state=RunningState(transcoder, settings),
            counters=Counters(),
            target_l0=target,
            targets=self.targets,
            comm=comm,
            workspace=Workspace(),
        )

        # Helpers.
        self.records = Records(self.folder / "metrics.jsonl", comm.is_main)
        self.evaluation: Evaluation | None = None
        self.behaviour = behaviour
        self.guard = Guard(self.parts, self.records, token_name)
        self.result: TrainResult | None = None

    # The run.

    def run(self) -> TrainResult:
        """Train to the end, or until asked to stop."""
        for _ in self.steps():
            pass
        assert self.result is not None
        return self.result

    def steps(self, stop: StopRequest | None = None) -> Iterator[int]:
        """The same step by step, so that several trainings may take turns; a `stop` that is given serves them all."""
        parts, counters = self.parts, self.parts.counters
        if not self._resume() and self.neurons is not None:
            start_from_neurons(parts.transcoder, self.neurons, self.normalisation, self.comm)
        begun = time.perf_counter() - counters.seconds
        while True:
            self.parts = self.parts._replace(settings=eased(self.settings, self.parts.counters.rewinds))
            try:
                yield from self._steps_from_here(begun, stop)
                return
            except Diverged as divergence:
                self._rewind(divergence)

    def _steps_from_here(self, begun: float, stop: StopRequest | None) -> Iterator[int]:
        settings, counters = self.settings, self.parts.counters
        rank, world = self._readers()
        loader = self.store.loader(
            settings.batch, counters.step, settings.steps - counters.step, self.device,
            rank=rank, world=world, prefetch=settings.prefetch,
        )  # fmt: skip
        with nullcontext(stop) if stop else StopRequest(self.comm) as stop, loader:
            self.records.start(counters.step)
            for batch in loader:
                x, y = self._normalised(batch)
                self.guard.batch = batch
                if counters.step % LOOK_EVERY == 0:
                    look(self.parts, x, y)
                if self._due(self.parts.settings.resample_every):
                    start_again(self.parts, x, y)
                train_step(self.parts, x, y)
                if not self.records.speed:
                    self.records.set_apart(counters.step, loader.stall_seconds, self.device)
                counters.seconds = time.perf_counter() - begun
                self.progress("training", counters.step, settings.steps, self.records.note)
                last = counters.step == settings.steps
                if self._due(settings.log_every) or last:
                    self._log(loader.stall_seconds)
                if self._due(settings.eval_every) and not last:  # the end is measured in any case
                    self._evaluate(settings.eval_tokens)
                stopping = stop.requested(counters.step)
                if stopping or self._due(settings.checkpoint_every) or last:
                    self._save()
                self.checkpoints.finish(wait=stopping or last)
                if stopping:
                    self.result = self._interrupted(stop.by_person)
                    return
                yield counters.step
        self.result = self._finish()

    def _due(self, every: int) -> bool:
        step = self.parts.counters.step
        return every > 0 and step > 0 and step % every == 0

    def _readers(self) -> tuple[int, int]:
        """Which part of a batch this rank reads, and of how many: feature ranks share rows out, where these divide."""
        comm = self.comm
        if self.settings.batch % (comm.data_ranks * comm.feature_ranks):
            return comm.data_rank, comm.data_ranks
        return comm.data_rank * comm.feature_ranks + comm.feature_rank, comm.data_ranks * comm.feature_ranks

    def _normalised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = self.reading.of(batch), batch.mlp_out
        if len(x) * self.comm.data_ranks < self.settings.batch:
            x, y = whole_rows(x, self.comm), whole_rows(y, self.comm)
        return self.normalisation.x(x), self.normalisation.y(y)

    # The beginning.

    def _new_transcoder(self, init: Transcoder | None) -> Transcoder:
        """This rank's part, on its device; where a checkpoint stands, nothing is drawn that it will overwrite."""
        shape, d_model, seed = self._shape(), self.store.d_model, self.settings.seed
        if self.found is not None:
            return new_part(shape, d_model, self.layers, None, self.meta, self.comm).to(self.device)
        rates, decoder = self._rates(), self.settings.init_decoder
        if init is not None:  # what the other lacks fires rarely at first, since it has to learn to write
            rates = [FRESH_SHARE * rate for rate in rates]
        part = new_part(shape, d_model, self.layers, seed, self.meta, self.comm, decoders=decoder != "zero")
        part = part.to(self.device)
        batch = self.store.batch(0, 0, min(len(self.store), rows_for(min(rates))))
        x = self.normalisation.x(self.reading.of(batch.to(self.device)))
        initialise(part, x, own_slice(self.normalisation.y_mean, self.comm), rates, decoder)
        if init is not None:
            start_from(part, init, self.normalisation, self.comm)
        return part

    def _shape(self) -> TranscoderSettings:
        """The transcoder's settings, where topk's k is the target: it goes into the export."""
        shape = self.transcoder_settings
        if shape.activation != "topk" or self.targets is None:
            return shape
        return dataclasses.replace(shape, k=round(max(self.targets)), k_per_layer=[round(k) for k in self.targets])

    def _rates(self) -> list[float]:
        """The share of tokens on which a feature fires at first."""
        sizes = self.transcoder_settings.sizes(len(self.layers))
        if self.settings.init_firing_rate is not None:
            return [self.settings.init_firing_rate] * len(sizes)
        wanted = self.targets or [float(k) for k in self.transcoder_settings.ks(len(sizes))]
        if self.transcoder_settings.activation in TOPK:
            wanted = [self.settings.first_k(target, size) for target, size in zip(wanted, sizes, strict=True)]
        return [min(0.5, target / size) for target, size in zip(wanted, sizes, strict=True)]

    def _tensors(self) -> dict[str, Tensor]:
        parts = self.parts
        named = {f"weights/{name}": tensor.data for name, tensor in parts.transcoder.named_parameters()}
        named |= parts.optimizers.tensors()
        named |= {f"state/{name}": tensor for name, tensor in parts.state.tensors().items()}
        scales = self.normalisation._asdict()
        named |= {f"normalisation/{name}": tensor for name, tensor in scales.items()}
        return named | {"random/cpu": torch.get_rng_state()}

    def _resume(self) -> bool:
        """Go on from the newest whole checkpoint; False where there is none."""
        states: dict[str, Any] = {}
        if self.found is not None:
            path, saved = self.found
            check_same_run(saved, self._description(), self.folder)
            tensors = self._tensors()
            self.checkpoints.load(path, tensors)
            torch.set_rng_state(tensors["random/cpu"])
            for name, value in saved["counters"].items():
                setattr(self.parts.counters, name, float("inf") if value is None else value)
            states = saved.get("trackers", {})
        for tracker in self.trackers if self.comm.is_main else []:
            tracker.resume(states.get(type(tracker).__name__, {}))
        return self.found is not None

    def _description(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        return {
            "trainer": dataclasses.asdict(self.settings),
            "transcoder": dataclasses.asdict(self.transcoder_settings),
            **self.identity,
        }

    def _save(self) -> None:
        counters = dataclasses.asdict(self.parts.counters)
        counters = {name: None if value == float("inf") else value for name, value in counters.items()}
        trackers = {type(t).__name__: t.state() for t in self.trackers} if self.comm.is_main else {}
        state = {"counters": counters, "trackers": trackers, **self._description()}
        self.checkpoints.save(self.parts.counters.step, self._tensors(), state)

    # What is looked at on the way.

    def _log(self, stall_seconds: float) -> None:
        parts = self.parts
        values, histograms = training_values(parts, stall_seconds, self.records)
        if values["bad_steps_in_row"] >= MOST_BAD_STEPS:
            cure = "; bf16 has float32's range" if self.settings.precision == "fp16" else ""
            raise UserError(
                f"training stopped at step {parts.counters.step}: loss or gradient was not finite for "
                f"{values['bad_steps_in_row']:.0f} steps in a row; lower trainer.lr or look at the store's values{cure}"
            )
        self.records.note = f"nmse {values['nmse']:.4f}  l0 {values['l0']:.1f}  dead {values['dead']:.1%}"
        self._emit(values, histograms)
        self.guard.look(values["nmse"])

    def _rewind(self, divergence: Diverged) -> None:
        """Back to the newest checkpoint, to go on from there more carefully."""
        rewinds = self.parts.counters.rewinds + 1
        self.checkpoints.finish()
        self.found = self.checkpoints.newest()
        if rewinds > MOST_REWINDS or not self._resume():
            cause = f"{MOST_REWINDS} rewinds did not help" if rewinds > MOST_REWINDS else "there is no checkpoint yet"
            raise UserError(f"training stopped at {divergence} ({cause}: lower trainer.lr)") from divergence
        counters = self.parts.counters
        counters.rewinds, counters.diverging, self.parts.state.held = rewinds, False, None
        self.guard.say(f"gone back to step {counters.step}, after {divergence}")

    def _emit(self, values: dict[str, float], histograms: dict[str, Tensor]) -> None:
        self.records.write(self.parts.counters.step, values)
        for tracker in self.trackers if self.comm.is_main else []:
            tracker.log(self.parts.counters.step, values, histograms)

    def _evaluate(self, tokens: int) -> Evaluation:
        parts, counters = self.parts, self.parts.counters
        targets = self.targets
        if targets is None and self.transcoder_settings.activation in TOPK:
            targets = [float(k) for k in self.transcoder_settings.ks(len(self.layers))]
        # In float32, as an export is used: in bfloat16, pre-activations tie at the thresholds.
        self.evaluation = evaluate(parts.transcoder, self.held_out, tokens, targets, self.comm)
        report = self.evaluation.report
        values = {f"held_out/{name}": value for name, value in report["overall"].items()}
        for layer, figures in zip(self.layers, report["layers"], strict=True):
            values |= {f"held_out/{name}/{layer}": value for name, value in figures.items()}
        if self.evaluation.thresholds is not None:
            own = torch.stack([theta.mean() for theta in self.evaluation.thresholds])
            means = (self.comm.all_reduce_features(own) / self.comm.feature_ranks).tolist()
            values |= {f"held_out/theta/{layer}": mean for layer, mean in zip(self.layers, means, strict=True)}
        if self.behaviour is not None and self.comm.feature_ranks == 1:  # a rank's part replaces no MLP
            values |= {f"held_out/{name}": v for name, v in self.behaviour(self._folded(self.evaluation)).items()}
        histograms = {f"held_out/density/{l}": d.cpu() for l, d in zip(self.layers, self.evaluation.densities)}
        self._emit(values | {"held_out/tokens": report["tokens"]}, histograms)
        self.guard.look(report["overall"]["nmse"], held_out=True)
        score = self.comm.broadcast(self._score(report))  # one decides for all: an export is a collective
        if self.settings.keep_best and score < counters.best_score:
            counters.best_score = score
            self._export("best", self.evaluation)
        return self.evaluation

    def _score(self, report: dict[str, Any]) -> float:
        """Lower is better: nmse where k fixes L0 or L0 is on its target, more where it is off; else the newest."""
        if self.transcoder_settings.activation in TOPK:
            return report["overall"]["nmse"]
        if self.targets is None:
            return -float(self.parts.counters.step)
        off = [abs(row["l0"] / target - 1) for row, target in zip(report["layers"], self.targets, strict=True)]
        return report["overall"]["nmse"] * (1 + 10 * max(0.0, max(off) - 0.05))

    # The end.

    def _export(self, name: str, evaluation: Evaluation) -> Path:
        """The transcoder on raw activations, thresholds included, as one ordinary folder."""
        # A scaled copy of the weights takes the gradients' place.
        self.parts.optimizers.zero_grad()
        self.parts.workspace.clear()
        scales: Normalisation = self.normalisation
        chooses = self.transcoder_settings.activation == "topk"
        folded = self._folded(evaluation)
        meta = {
            "normalisation": {"in_scale": scales.in_scale.tolist(), "out_scale": scales.out_scale.tolist()},
            "trained_as": {
                "activation": self.transcoder_settings.activation,
                "steps": self.parts.counters.step,
                "tokens": self.parts.counters.step * self.settings.batch,
            },
            "held_out": evaluation.report["overall"] | {"tokens": evaluation.report["tokens"]},
        }
        if chooses and evaluation.thresholds is not None:
            meta["thresholds"] = [float(tau_F[0]) for tau_F in evaluation.thresholds]
        return save_whole(folded, self.folder / name, meta, self.transcoder_settings, self.comm)

    def _folded(self, evaluation: Evaluation) -> Transcoder:
        """This rank's part on raw activations."""
        thresholds = None if self.transcoder_settings.activation == "topk" else evaluation.thresholds
        return self.parts.transcoder.folded(self.normalisation.in_scale, self.normalisation.out_scale, thresholds)

    def _interrupted(self, by_person: bool) -> TrainResult:
        step = self.parts.counters.step
        report = {} if self.evaluation is None else self.evaluation.report
        self._close(report)
        message = f"stopped at step {step} of {self.settings.steps} and saved: run the same command again to go on"
        return TrainResult("interrupted", step, self.folder, report, message, by_person, self.records.speed)

    def _finish(self) -> TrainResult:
        evaluation = self._evaluate(max(self.settings.calibrate_tokens, self.settings.eval_tokens))
        folder = self._export("transcoder", evaluation)
        self._close(evaluation.report)
        message, speed = f"wrote {folder}", self.records.speed
        return TrainResult("finished", self.settings.steps, self.folder, evaluation.report, message, speed=speed)

    def _close(self, report: dict[str, Any]) -> None:
        summary = {f"held_out/{name}": value for name, value in report.get("overall", {}).items()}
        for tracker in self.trackers if self.comm.is_main else []:
            tracker.close(summary | self.records.speed)
        self.records.close()


def train(
    settings: TrainerSettings,
    transcoder_settings: TranscoderSettings,
    store: ActivationStore,
    held_out: ActivationStore,
    run_dir: str | Path,
    **options: Any,
) -> TrainResult:
    """Train a transcoder in `run_dir`, or go on with the one that is there; `options` are Trainer's keywords."""
    with room_for(run_dir):
        return Trainer(settings, transcoder_settings, store, held_out, run_dir, **options).run()


@contextmanager
def room_for(run_dir: str | Path) -> Iterator[None]:
    """A full disk, in a sentence."""
    try:
        yield
    except OSError as error:
        if not out_of_room(error):
            raise
        raise UserError(
            f"the files of {run_dir} could not be written ({error.strerror}); make room and run the same command "
            "again, it goes on from the newest checkpoint"
        ) from error
