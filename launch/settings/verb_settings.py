"""The settings that stand at the top level of a verb's configuration.

Everything else is configured by the groups (`crosslace.conf`), whose settings stand beside the code they configure.
"""

import re
from dataclasses import dataclass, field

from ...data.errors import SettingsError, check_choice, check_range

MODES = ("steer", "free", "constrained", "direct")
FREEZES = ("attention", "norms")
FORMATS = ("circuit-tracer", "saelens", "neuronpedia")
FOLLOWING = ("eval", "features", "trace", "checkpoints")
TRAINED_FIGURES = ("nmse", "fvu", "cosine", "l0", "dead")
"""Held-out figures that every training logs."""
SOURCES = ("auto", "circuit-tracer", "gemma-scope", "llamascopium", "saelens", "sparsify", "neuronpedia")


@dataclass(frozen=True)
class Common:
    """What every verb takes."""

    seed: int = 0
    """Where all random numbers start."""
    debug: bool = False
    """Show the traceback of an error instead of its sentence alone."""


@dataclass(frozen=True)
class DemoVerbSettings(Common):
    """The demonstration."""

    run: str = "runs/demo"
    """The folder for all that the demo makes."""


@dataclass(frozen=True)
class DemoSettings:
    """How much the demonstration does."""

    cities: int = 40
    """Held-out cities whose circuit is traced, to see whether its path names the right state."""
    pairs: int = 200
    """Held-out pairs of cities whose state features are swapped."""
    circuits: int = 6
    """On a model other than the world: kinds of questions of which one is traced and drawn."""

    def __post_init__(self) -> None:
        check_range("demo.cities", self.cities, low=1)
        check_range("demo.pairs", self.pairs, low=1)
        check_range("demo.circuits", self.circuits, low=0)


@dataclass(frozen=True)
class WorldVerbSettings(Common):
    """The bundled world."""

    rebuild: bool = False
    """Train the world anew, even where it is shipped or in the cache; the new one takes the cached one's place."""
    out: str | None = None
    """Also write the world to this new folder, in the form in which the package ships it."""


@dataclass(frozen=True)
class CacheSettings(Common):
    """Caching activations."""

    plan: bool = False
    """Say what the store would weigh and how long it would take, on disk and streamed, and do nothing; `--plan` is
    short for it."""


@dataclass(frozen=True)
class StoreVerbSettings(Common):
    """A store, looked at."""

    path: str = ""
    """The store's folder or URL, or a folder whose stores are listed; `crosslace store PATH` is short for it."""
    verify: bool = False
    """Read all of it and name the shard and the rows that are not what was written."""
    remove: bool = False
    """Remove a store that is incomplete, or every such one in a folder of stores."""

    def __post_init__(self) -> None:
        require("path", self.path, "the folder or URL of a store")


@dataclass(frozen=True)
class TrainSettings(Common):
    """Training."""

    run: str = ""
    """The folder for the run; a run that was cut off goes on when the same command is given again."""
    init: str = "auto"
    """What the training begins with: mlp, the language model's own neurons; random, fresh features; or a run or a
    transcoder's folder, of other reach or activation or with fewer features. auto is mlp, and random for mixtures of
    experts."""
    plan: bool = False
    """Say what the run would take and whether it fits, and do nothing; `--plan` is short for it."""

    def __post_init__(self) -> None:
        if not self.plan:
            require("run", self.run, "a folder for the run, such as runs/clt")


@dataclass(frozen=True)
class ThenSettings:
    """What follows a training in the same command."""

    do: list[str] = field(default_factory=list)
    """Any of eval, features, trace (graphs over the prompt set) and checkpoints (scores and one graph over those that
    `trainer.keep_every` keeps); their settings may be given too. `then=[eval,features,trace]` is short for it."""
    graph: str = ""
    """The prompt whose graph is followed over the checkpoints; the first of the set where none is given."""

    def __post_init__(self) -> None:
        for name in self.do:
            check_choice("then", name, FOLLOWING)


@dataclass(frozen=True)
class EvalVerbSettings(Common):
    """Evaluation."""

    run: str = ""
    """The run, or any folder that holds a transcoder."""
    overwrite: bool = False
    """Replace an evaluation of this run that was made with other settings."""

    def __post_init__(self) -> None:
        require("run", self.run, "the folder of a run")


@dataclass(frozen=True)
class FeaturesSettings(Common):
    """Feature dashboards."""

    run: str = ""
    """The run, or any folder that holds a transcoder."""
    overwrite: bool = False
    """Replace dashboards of this run that were made with other settings; names given by hand stay in any case."""

    def __post_init__(self) -> None:
        require("run", self.run, "the folder of a run")


@dataclass(frozen=True)
class TraceVerbSettings(Common):
    """Tracing."""

    run: str = ""
    """The run, or any folder that holds a transcoder."""
    prompt: str = ""
    """The text whose next token is to be explained."""
    prompts: str = ""
    """A set of prompts in its place, as in `eval.prompt_set`: auto, english, stdlib, questions."""
    count: int = 20
    """How many prompts of the set."""
    slug: str | None = None
    """The graph's short name: letters, digits, `_`, `.` and `-`; made from the prompt when not given."""
    overwrite: bool = False
    """Replace a graph of this name that answers another question; supernodes made by hand stay where their nodes do."""
    force: bool = False
    """Trace although the transcoder was trained on another model."""
    heads: bool = False
    """Also find the heads of the graph's strongest edges, and why the heads that carry most looked where they did;
    kept as heads.json beside the graph."""
    groups: bool = False
    """Also propose groups of features that go back to the same tokens, in place of groups of one name, and try them out
    on the model: the answer without them, and with them alone."""

    def __post_init__(self) -> None:
        require("run", self.run, "the folder of a run")
        check_range("count", self.count, low=1)
        if not self.prompts:
            require("prompt", self.prompt, "the text whose next token is to be explained")
        elif self.prompt or self.slug:
            raise SettingsError("prompts names a set; leave prompt and slug out, or prompts")
        if self.slug is not None and re.fullmatch(r"[A-Za-z0-9_.-]+", self.slug) is None:
            raise SettingsError(f"slug={self.slug} cannot be used; it takes letters, digits, `_`, `.` and `-`")


@dataclass(frozen=True)
class SteerSettings(Common):
    """Interventions."""

    run: str = ""
    """The run, or any folder that holds a transcoder."""
    prompt: str = ""
    """The text to which the model answers."""
    graph: str = ""
    """A graph of the run, by its slug: `supernode` names the features to set, and its prompt is used where none is
    given."""
    supernode: str = ""
    """A group of that graph, all of whose features are multiplied by `times`."""
    times: float = 0.0
    """What the supernode's activations are multiplied by: 0 ablates, -2 turns them round twice as strong."""
    set: list[dict] = field(default_factory=list)
    """The features to set: each entry has layer, position (a number, or "2:5"), feature, and `value`, `times` (0
    ablates) or `patch_from` (another prompt). Lists of `times` or `value` are tried one by one, side by side."""
    mode: str = "steer"
    """Who answers: `steer` (the model's own MLPs, with what the features write added), `free` (the transcoder, features
    encoded anew), `constrained` (nobody inside `layers`, the model after), `direct` (nobody: the graph's edges)."""
    freeze: list[str] = field(default_factory=list)
    """What stays as it was without the change, everywhere: `attention` (its patterns), `norms` (their denominators)."""
    mlps: list[dict] = field(default_factory=list)
    """Who answers in some layers instead: each entry has `layers` (the first, and the one after the last) and `by`
    (model, transcoder or clean)."""
    layers: list[int] | None = None
    """For `constrained`: the first layer and the one after the last in which all else is frozen."""
    top: int = 5
    """How many next tokens to show."""
    generate: int = 0
    """How many tokens to write, with and without the intervention."""
    force: bool = False
    """Steer although the transcoder was trained on another model."""

    def __post_init__(self) -> None:
        require("run", self.run, "the folder of a run")
        if not self.graph:
            require("prompt", self.prompt, "the text to which the model answers")
        check_choice("mode", self.mode, MODES)
        for what in self.freeze:
            check_choice("freeze", what, FREEZES)
        check_range("top", self.top, low=1)
        check_range("generate", self.generate, low=0)
        if self.layers is not None and len(self.layers) != 2:
            raise SettingsError(f"layers={self.layers} is not a range; it takes two layers, such as layers=[0,4]")


@dataclass(frozen=True)
class CompareSettings(Common):
    """Comparing graphs."""

    run: str = ""
    """The run whose graphs are named by their slugs; not needed where folders are given."""
    first: str = ""
    """A graph: its slug, or its folder."""
    second: str = ""
    """Another one, of the same transcoder."""
    by: str = "tokens"
    """What makes two features the same: `tokens` (positions of tokens that the prompts share), `position`, or `feature`
    (wherever it fires)."""
    top: int = 10
    """How many features to list."""

    def __post_init__(self) -> None:
        require("first", self.first, "a graph's slug or folder")
        require("second", self.second, "another graph's slug or folder")
        check_choice("by", self.by, ("position", "tokens", "feature"))
        check_range("top", self.top, low=1)


@dataclass(frozen=True)
class ViewVerbSettings(Common):
    """The viewer."""

    run: str = "runs"
    """A run, or a folder of runs."""
    graph: str = ""
    """With `html`: the graph whose page is written."""
    html: str = ""
    """Write the page of one graph as one file that opens from disk, and serve nothing."""

    def __post_init__(self) -> None:
        if bool(self.graph) != bool(self.html):
            raise SettingsError(
                "graph and html belong together: graph=dallas html=dallas.html writes that graph's page"
            )


@dataclass(frozen=True)
class ExportSettings(Common):
    """Export."""

    run: str = ""
    """The run, or any folder that holds a transcoder; for Neuronpedia a run or a graph's folder."""
    to: str = "circuit-tracer"
    """The format: circuit-tracer, saelens, or neuronpedia (graphs)."""
    out: str = ""
    """The folder to write to."""

    def __post_init__(self) -> None:
        require("run", self.run, "the folder of a run")
        require("out", self.out, "the folder to write to")
        check_choice("to", self.to, FORMATS)


@dataclass(frozen=True)
class PublishSettings(Common):
    """Publication."""

    run: str = ""
    """The run; it must have been evaluated."""
    out: str = ""
    """The folder to make; its name is the model's."""
    license: str = ""
    """The licence under which you publish, as the hub spells it: mit, apache-2.0, cc-by-4.0, ...; a transcoder is made
    of a model's activations, so look at what that model's licence asks."""
    upload: str = ""
    """OWNER/NAME on the hub to send it to, with your own credentials (`hf auth login`); nothing is sent without it."""
    private: bool = True
    """Whether what is uploaded is private at first."""

    def __post_init__(self) -> None:
        require("run", self.run, "the folder of an evaluated run")
        require("out", self.out, "the folder to make, named as the model is to be called")
        require("license", self.license, "the licence under which you publish, such as license=mit or apache-2.0")
        if self.upload and re.fullmatch(r"[\w.-]+/[\w.-]+", self.upload) is None:
            raise SettingsError(f"upload={self.upload} is no place on the hub; it takes OWNER/NAME")


@dataclass(frozen=True)
class ImportSettings(Common):
    """Import."""

    path: str = ""
    """The folder (or file) to read; not needed where `from` names a place."""
    format: str = "auto"
    """Its format: auto (told by what is there), circuit-tracer, gemma-scope, llamascopium, saelens, sparsify, or
    neuronpedia (one graph); or the place itself, `hub:OWNER/NAME[@revision][:subfolder]`, or a folder. `from=` is
    short for it."""
    run: str = ""
    """The run to make of it."""
    l0: int | None = None
    """Gemma Scope: of each layer's transcoders, the one whose average L0 is nearest."""

    def __post_init__(self) -> None:
        require("run", self.run, "the folder of the run to make")
        if self.path or self.format in SOURCES:
            require("path", self.path, "the folder or file to read")
            check_choice("format", self.format, SOURCES)


@dataclass(frozen=True)
class SweepSettings(Common):
    """Sweeps."""

    run: str = ""
    """The folder for all runs of the sweep; runs that are complete are not run again."""
    jobs: int = 0
    """At most so many runs; 0 for all combinations."""
    init: str = "auto"
    """What each training begins with, as for `crosslace train`; may have several values."""
    stack: bool = False
    """Train the combinations that share store and batch side by side in one process, on one pass over the data. Each
    becomes the run that it would be alone; all of them must fit into the memory together."""
    print: str = ""
    """`wandb`: run nothing, and print the sweep's configuration for `wandb sweep` and `wandb agent`."""
    objective: str = "min nmse"
    """With `print=wandb`: the held-out figure that a search looks at, and whether it is to be small or large."""

    def __post_init__(self) -> None:
        require("run", self.run, "a folder for the sweep, such as runs/sweep")
        if self.print:
            check_choice("print", self.print, ("wandb",))
        goal, _, figure = self.objective.partition(" ")
        if goal not in ("min", "max") or figure not in TRAINED_FIGURES:
            raise SettingsError(
                f"objective={self.objective!r} is nothing that a training writes; it is min or max and one of "
                f"{', '.join(TRAINED_FIGURES)}"
            )


@dataclass(frozen=True)
class LauncherSettings:
    """Where the runs of a sweep run."""

    name: str = "basic"
    """`basic` (one after another, here), `processes` (several at once on this machine, each on a GPU of its own where
    there are any), or one of Hydra's launchers: `joblib`, `submitit_local`, `submitit_slurm`."""
    jobs: int = 0
    """How many runs at once under `processes`; 0 for one a GPU, or one."""
    options: dict = field(default_factory=dict)
    """The launcher's own settings, such as `launcher.options.partition=gpu`; Hydra checks them."""

    def __post_init__(self) -> None:
        check_choice("launcher.name", self.name, ("basic", "processes", "joblib", "submitit_local", "submitit_slurm"))
        check_range("launcher.jobs", self.jobs, low=0)


@dataclass(frozen=True)
class RunsSettings(Common):
    """Lists of runs."""

    run: str = "runs"
    """The folder that is searched."""
    where: str = ""
    """Figures that a run must have, such as "l0<=16 and dead<0.05"."""
    having: str = ""
    """Settings that a run must have, such as "transcoder.k=16 and seed=0"."""
    compare: list[str] = field(default_factory=list)
    """Two runs whose settings are compared; `crosslace runs RUN RUN` is short for it."""

    def __post_init__(self) -> None:
        if self.compare and len(self.compare) != 2:
            raise SettingsError(f"compare takes two runs, not {len(self.compare)}")
        if wrong := [part for part in self.having.split(" and ") if self.having and "=" not in part]:
            raise SettingsError(f"having={wrong[0]!r} is no setting with a value, such as transcoder.k=16")


@dataclass(frozen=True)
class SeedsSettings(Common):
    """A graph over several seeds."""

    run: str = ""
    """The folder of a sweep over the seed."""
    runs: list[str] = field(default_factory=list)
    """Runs that differ in their seed; `crosslace seeds RUN RUN` is short for it. The first one's graph is looked at."""
    slug: str = ""
    """The graph, by its short name in the first run."""
    tokens: int = 8192
    """Held-out tokens on which it is compared when features fire."""
    node: float = 0.8
    """Share of influence that the nodes of the pruned graphs carry."""
    edge: float = 0.98
    """Share of influence that their edges carry."""

    def __post_init__(self) -> None:
        if not self.run and not self.runs:
            raise SettingsError("run is missing; it takes the folder of a sweep over the seed")
        require("slug", self.slug, "the short name of a graph of the first run")
        check_range("tokens", self.tokens, low=1)


@dataclass(frozen=True)
class ReportSettings(Common):
    """Reports."""

    run: str = ""
    """One run, or the folder of a sweep."""
    runs: list[str] = field(default_factory=list)
    """Several runs; `crosslace report RUN RUN` is short for it."""
    out: str | None = None
    """The page to write; beside the run when not given."""
    pick: str = ""
    """Which run is wanted, such as "min nmse where l0<=16 and dead<0.05"."""

    def __post_init__(self) -> None:
        if not self.run and not self.runs:
            raise SettingsError("run is missing; it takes the folder of a run or of a sweep")


def require(setting: str, value: str, what: str) -> None:
    """Refuse a setting that has no default and was not given."""
    if not value.strip():
        raise SettingsError(f"{setting} is missing; it takes {what}")
