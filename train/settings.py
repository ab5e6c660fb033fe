"""What a transcoder is, and how it is trained."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from ..data.errors import SettingsError, check_choice, check_range

ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
TOPK = ("topk", "batchtopk")
"""The activations that keep k features, and need no penalty."""

DECAYS = ("linear", "cosine", "constant")
SPARSITIES = ("auto", "tanh", "l1", "l0", "target")
OPTIMIZERS = ("adam", "adamw", "muon")
PRECISIONS = ("auto", "float32", "tf32", "bf16", "fp16")

# Coefficients of the penalties where none is given.
LAM, LAM_TARGET = 1e-3, 0.1

# Trainings up to so many steps take so many times the published rate, which is meant for long ones.
_SHORT_STEPS, _SHORT_SCALE = 4000, 6.0
_DEAD_AFTER = 10_000, 1_000_000
_K_SHARE = 0.35

# Below this, a bandwidth belongs to activations of unit norm, not to E|x|^2 = D.
_LEAST_BANDWIDTH = 0.05


T = TypeVar("T")


def free(default: T) -> T:
    """The default of a setting that a run may change when it goes on: it decides no weight, or none beyond rounding."""
    return field(default=default, metadata={"free": True})


def changes(cls: type, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings of a class in which a run that goes on must not differ and does. What only one of the two versions
    knows is passed over; a run at a constant learning rate may get more steps."""
    fixed = [one.name for one in fields(cls) if not one.metadata.get("free") and one.name in before and one.name in now]
    found = [name for name in fixed if before[name] != now[name]]
    longer = now.get("lr_schedule") == "constant" and before.get("steps", 0) < now.get("steps", 0)
    return [name for name in found if name != "steps" or not longer]


@dataclass(frozen=True)
class TranscoderSettings:
    """What the transcoder is; how it is trained stands in `TrainerSettings`."""

    features: int = 1024
    """Features of each layer."""

    features_per_layer: list[int] | None = None
    """Features of each covered layer, one number a layer; takes the place of `features`."""

    reach: str = "all"
    """How many layers a feature writes to, its own first: 1 (per-layer), all (cross-layer), or a number between."""

    activation: str = "batchtopk"
    """relu, jumprelu, topk (k per token and layer) or batchtopk (k per token on average over the batch)."""

    k: int = 16
    """Active features per token and layer, for topk and batchtopk; `trainer.target_l0` takes its place where given."""

    k_per_layer: list[int] | None = None
    """k of each covered layer, one number a layer; takes the place of `k`."""

    k_scope: str = "layer"
    """batchtopk: `layer` keeps k features in each layer; `all` keeps n_layers * k over all layers together, so that
    some layers have more than others."""

    skip: bool = False
    """Add a linear map from each layer's input to its output."""

    read: str = "auto"
    """The site that is read: mlp_in (after the norm before the MLP), resid (before it), or auto: what `init` reads
    where that is a run; else mlp_in, or resid where no MLP has a norm before it or the store cannot tell."""

    layers: list[int] | None = None
    """Layers of the model to cover; all of the store's where not given."""

    theta_init: float = 0.03
    """jumprelu: the first value of all thresholds. Inputs are scaled so that their mean squared norm is the model's
    width."""

    bandwidth: float = 1.0
    """jumprelu: how near a pre-activation must be to its threshold to give the threshold a gradient (inputs scaled as
    for theta_init)."""

    ste_reaches_h: bool = True
    """jumprelu: pass that gradient to the pre-activation as well, not to the threshold alone."""

    def __post_init__(self) -> None:
        check_choice("transcoder.activation", self.activation, ACTIVATIONS)
        check_choice("transcoder.k_scope", self.k_scope, ("layer", "all"))
        check_choice("transcoder.read", self.read, ("auto", "resid", "mlp_in"))
        for setting, sizes in (("features", [self.features]), ("features_per_layer", self.features_per_layer or [])):
            for size in sizes:
                check_range(f"transcoder.{setting}", size, low=1)
        for setting, sizes in (("k", [self.k]), ("k_per_layer", self.k_per_layer or [])):
            for size in sizes:
                check_range(f"transcoder.{setting}", size, low=1)
        self.reach_of(1)
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise SettingsError(f"transcoder.layers={self.layers} must name each layer once, in rising order")
        if self.features_per_layer and self.layers and len(self.features_per_layer) != len(self.layers):
            self.sizes(len(self.layers))
        if self.activation == "jumprelu":
            check_range("transcoder.theta_init", self.theta_init, low=1e-6)
            if not _LEAST_BANDWIDTH <= self.bandwidth < math.inf:
                raise SettingsError(
                    f"transcoder.bandwidth={self.bandwidth} belongs to activations of unit norm; here E|x|^2 = D, "
                    f"and it takes {_LEAST_BANDWIDTH} or more, usually 1.0"
                )

    def reach_of(self, n_layers: int) -> int:
        """The reach as a number of layers."""
        if self.reach == "all":
            return n_layers
        if not str(self.reach).isdecimal() or int(self.reach) < 1:
            raise SettingsError(f"transcoder.reach={self.reach} is not known; it takes all or a number from 1")
        return min(int(self.reach), n_layers)

    def sizes(self, n_layers: int) -> list[int]:
        """Features of each covered layer."""
        return self._each("features", n_layers)

    def ks(self, n_layers: int) -> list[int]:
        """k of each covered layer."""
        return self._each("k", n_layers)

    def _each(self, name: str, n_layers: int) -> list[int]:
        one, each = getattr(self, name), getattr(self, f"{name}_per_layer")
        if each is None:
            return [one] * n_layers
        if len(each) != n_layers:
            raise SettingsError(f"transcoder.{name}_per_layer has {len(each)} numbers for {n_layers} layers")
        return list(each)


@dataclass(frozen=True)
class TrainerSettings:
    """Steps, losses, schedules, optimizer, and what is written when."""

    steps: int = 1200
    """Optimizer steps."""

    batch: int = 1024
    """Tokens in a step, counted over all processes and micro-batches."""

    accumulate: int = free(1)
    """Micro-batches in a step: more of them take less memory, and the result is the same."""

    seed: int = 0
    """Where random numbers start: initial weights, order of the data, resampling."""

    device: str = free("auto")
    """auto (this process's GPU, the CPU where there is none), cpu, cuda, cuda:N or mps."""

    precision: str = "auto"
    """Precision of matrix products: float32, tf32 (a GPU's faster float32 with fewer digits), bf16, fp16, or auto: what
    `accelerate config` says, else float32. Parameters, norms and penalties are float32 always."""

    sparse: str = free("auto")
    """Compute with active features only (on) or with all (off); auto decides by how many are active."""

    optimizer: str = "adam"
    """adam, adamw, or muon (encoders and skips by Muon, the rest by AdamW)."""

    lr: float | None = None
    """Highest learning rate; 2e-4 * sqrt(2^14 / features) * lr_scale where not given."""

    lr_scale: float | None = None
    """Factor on the default learning rate. Not given, it goes by the length of the training: 6 up to 4,000 steps, then
    less in proportion, 1 from 24,000 on. 1 for lr_schedule=constant, and from a finished transcoder."""

    betas: list[float] | None = None
    """Adam's two decay rates; 0.9 and 0.999 where not given."""

    weight_decay: float = 0.0
    """Decay of the weight matrices, for adamw and muon."""

    clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""

    lr_warmup: float = 0.02
    """Share of the run over which the learning rate rises."""

    lr_decay: float = 0.2
    """Share of the run, at its end, over which the learning rate falls to zero."""

    lr_schedule: str = "linear"
    """How the learning rate falls: linear, cosine, or constant (not at all)."""

    target_l0: float | None = None
    """Wanted number of active features per token and layer on held-out text. topk and batchtopk take it as k; for relu
    and jumprelu the penalty is adjusted until it is met."""

    target_l0_per_layer: list[float] | None = None
    """target_l0 of each covered layer, one number a layer."""

    k_first: float | None = None
    """topk, batchtopk: k at the start of the run; ten times the final k where not given, at most a quarter of the
    features."""

    k_share: float | None = None
    """topk, batchtopk: share of the run over which k falls from k_first to its final value; 0 starts with the final
    one. Not given, 0.35 where the training begins with the model's neurons or k_first is given, else 0."""

    sparsity: str = "auto"
    """relu, jumprelu: the penalty, tanh, l1, l0, or target (quadratic in L0 around target_l0, for jumprelu); auto is
    tanh, whose coefficient target_l0 steers."""

    lam: float | None = None
    """The penalty's coefficient (not given, 0.1 for target and 0.001 for the others); where target_l0 steers tanh, l1
    or l0, its first value."""

    lam_per_layer: list[float] | None = None
    """lam of each covered layer, one number a layer."""

    lam_share: float = 1.0
    """Share of the run over which lam rises from 0; 0 keeps it at its value from the start."""

    tanh_c: float = 4.0
    """How fast the tanh penalty saturates: c in tanh(c * activation * norm of the decoder)."""

    lam_preactivation: float = 3e-6
    """relu, jumprelu: the coefficient of the pre-activation penalty."""

    preactivation_over: str = "dead"
    """Which features have the pre-activation penalty: dead or all."""

    aux_weight: float = 1 / 32
    """topk, batchtopk: weight of the auxiliary loss, in which dead features learn to reconstruct what is missing; 0
    turns it off."""

    aux_k: int | None = None
    """Dead features per token and layer in the auxiliary loss; half of d_model where not given."""

    dead_after: int | None = None
    """Tokens without firing after which a feature counts as dead. Not given, a twentieth of the training, from 10,000
    to a million; a million for lr_schedule=constant."""

    resample_every: int = 50
    """Every so many steps dead features start again, at tokens that are badly reconstructed; 0 turns it off."""

    resample_until: float = 0.8
    """Share of the run after which nothing is resampled."""

    on_divergence: str = free("warn")
    """What follows when the NMSE, in training or held out, is above 1 or ten times its best: warn says so, with the
    tokens that carry it; stop ends the run; rewind goes back to the last checkpoint, at half the learning rate and
    without resampling, three times at most."""

    init_firing_rate: float | None = None
    """Share of tokens on which each feature fires at the start, set by its bias; the first L0 / features where not
    given."""

    init_decoder: str = "zero"
    """The decoders' first values, for init=random: zero, or uniform."""

    calibrate_tokens: int = free(65_536)
    """Held-out tokens on which the thresholds of the finished transcoder are set."""

    log_every: int = free(50)
    """Steps between two lines of metrics."""

    eval_every: int = free(200)
    """Steps between held-out evaluations; 0 evaluates at the end only."""

    eval_tokens: int = free(16_384)
    """Held-out tokens of an evaluation during training; the last evaluation takes calibrate_tokens."""

    behaviour_tokens: int = free(0)
    """Held-out tokens of text on which each evaluation during training also measures what the language model does
    with its MLPs replaced (KL, CE recovered, top1), 2,000 at least; 0 leaves it out. The model then stays in memory."""

    checkpoint_every: int = free(500)
    """Steps between checkpoints; 0 writes the last one only."""

    keep_checkpoints: int = free(2)
    """How many of the newest checkpoints stay on disk."""

    keep_every: int = free(0)
    """Checkpoints of every so many steps are never removed; 0 keeps the newest alone."""

    keep_best: bool = free(False)
    """Export the best transcoder so far, by held-out nmse (at its L0), to `best/` as training goes on."""

    prefetch: int = free(2)
    """Batches that are read ahead of their use."""

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch", 1), ("accumulate", 1), ("log_every", 1), ("keep_checkpoints", 1)):
            check_range(f"trainer.{name}", getattr(self, name), low=low)
        for name in (
            "eval_every",
            "checkpoint_every",
            "keep_every",
            "resample_every",
            "clip",
            "lam_preactivation",
            "aux_weight",
        ):
            check_range(f"trainer.{name}", getattr(self, name), low=0)
        for name in ("lr_warmup", "lr_decay", "lam_share", "resample_until"):
            check_range(f"trainer.{name}", getattr(self, name), low=0, high=1)
        check_range("trainer.k_share", self.falling_share(), low=0, high=1)
        for name in ("eval_tokens", "calibrate_tokens", "prefetch"):
            check_range(f"trainer.{name}", getattr(self, name), low=1)
        check_range("trainer.dead_after", self.tokens_to_die(), low=1)
        if self.behaviour_tokens:
            check_range("trainer.behaviour_tokens", self.behaviour_tokens, low=2000)
        check_range("trainer.seed", self.seed, low=-(2**63), high=2**63 - 1)
        for name in ("lr", "lr_scale", "lam", "tanh_c", "target_l0", "target_l0_per_layer", "k_first", "aux_k"):
            _check_above_0(name, getattr(self, name))
        _check_above_0("init_firing_rate", self.init_firing_rate, high=1)
        for name, values, high in (
            ("weight_decay", [self.weight_decay], None),
            ("lam_per_layer", self.lam_per_layer or [], None),
            ("betas", self.betas or [], 1 - 1e-9),
        ):
            for value in values:
                check_range(f"trainer.{name}", value, low=0, high=high)
        check_choice("trainer.optimizer", self.optimizer, OPTIMIZERS)
        check_choice("trainer.on_divergence", self.on_divergence, ("warn", "stop", "rewind"))
        check_choice("trainer.precision", self.precision, PRECISIONS)
        check_choice("trainer.sparse", self.sparse, ("auto", "on", "off"))
        check_choice("trainer.sparsity", self.sparsity, SPARSITIES)
        check_choice("trainer.lr_schedule", self.lr_schedule, DECAYS)
        check_choice("trainer.preactivation_over", self.preactivation_over, ("dead", "all"))
        check_choice("trainer.init_decoder", self.init_decoder, ("zero", "uniform"))
        if self.lr_warmup + self.lr_decay > 1:
            raise SettingsError("trainer.lr_warmup and trainer.lr_decay together are more than the whole run")
        if self.batch % self.accumulate:
            raise SettingsError(
                f"trainer.batch={self.batch} does not divide into trainer.accumulate={self.accumulate} equal parts"
            )
        if self.sparsity == "target" and self.target_l0 is None and self.target_l0_per_layer is None:
            raise SettingsError("trainer.sparsity=target steers towards trainer.target_l0: give one")
        if self.weight_decay and self.optimizer == "adam":
            raise SettingsError("trainer.weight_decay is for adamw and muon: give trainer.optimizer=adamw")
        if self.betas is not None and len(self.betas) != 2:
            raise SettingsError(f"trainer.betas={self.betas} must be two numbers")

    def rate_scale(self) -> float:
        """`lr_scale`, or what suits so many steps: measured in docs/training.md, "Learning rate and length"."""
        if self.lr_scale is not None:
            return self.lr_scale
        if self.lr_schedule == "constant":
            return 1.0
        return min(_SHORT_SCALE, max(1.0, _SHORT_SCALE * _SHORT_STEPS / self.steps))

    def tokens_to_die(self) -> int:
        """`dead_after`, or what suits so many tokens."""
        if self.dead_after is not None:
            return self.dead_after
        least, most = _DEAD_AFTER
        return most if self.lr_schedule == "constant" else min(most, max(least, self.steps * self.batch // 20))

    def begun_with(self, finished: bool, neurons: bool) -> "TrainerSettings":
        """What is not given and goes by the start. The features of a finished transcoder need not find their places,
        and fresh ones learn more with the final k (docs/training.md, "Dead features")."""
        falls = self.k_first is not None or (not finished and (neurons or self.k_share is not None))
        lr_scale = self.lr_scale or 1.0 if finished else self.lr_scale
        return replace(self, k_share=self.falling_share() if falls else 0.0, lr_scale=lr_scale)

    def falling_share(self) -> float:
        """`k_share`, or what suits a start from neurons."""
        return _K_SHARE if self.k_share is None else self.k_share

    def penalty(self) -> str:
        """The sparsity penalty that `auto` stands for."""
        return "tanh" if self.sparsity == "auto" else self.sparsity

    def coefficients(self, n_layers: int) -> list[float]:
        """The penalty's coefficient for each covered layer."""
        default = LAM_TARGET if self.penalty() == "target" else LAM
        return self.per_layer("lam", n_layers) or [default] * n_layers

    def first_k(self, k: float, features: int) -> float:
        """topk kinds: where the annealing of k starts, in a layer of so many features."""
        if self.falling_share() == 0:
            return k
        return max(k, self.k_first or min(10 * k, features / 4))

    def per_layer(self, name: str, n_layers: int) -> list[float] | None:
        """`lam` or `target_l0` for each covered layer, from its single number or its list."""
        each, one = getattr(self, f"{name}_per_layer"), getattr(self, name)
        if each is None:
            return None if one is None else [float(one)] * n_layers
        if len(each) != n_layers:
            raise SettingsError(f"trainer.{name}_per_layer has {len(each)} numbers for {n_layers} layers")
        return [float(value) for value in each]


def _check_above_0(name: str, given: float | list[float] | None, high: float | None = None) -> None:
    for value in given if isinstance(given, list) else [] if given is None else [given]:
        check_range(f"trainer.{name}", value, high=high)
        if value <= 0:
            raise SettingsError(f"trainer.{name}={value} is too small; it takes more than 0")
