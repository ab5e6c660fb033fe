"""The registry of configuration: which settings class describes which group, and which verb takes which.

The classes themselves stand in the rooms, at the top of the module that they configure; here they are only named,
so that reading this costs no import. The YAML files beside it are Hydra's groups.
"""

from typing import NamedTuple


class Section(NamedTuple):
    """A group of settings, `trainer.*` say."""

    module: str
    """The file of the package in which the settings class stands."""
    settings: str
    """The class."""
    summary: str
    """What the group is about."""
    shorthand: str | None = None
    """The setting that `section=VALUE` sets when VALUE is not the name of a preset."""


SECTIONS = {
    "model": Section("data/model.py", "ModelSettings", "the language model", shorthand="name"),
    "dataset": Section("data/corpus.py", "DatasetSettings", "the text", shorthand="name"),
    "store": Section("data/harvest.py", "HarvestSettings", "the cached activations", shorthand="path"),
    "transcoder": Section("train/settings.py", "TranscoderSettings", "the dictionary that is trained"),
    "trainer": Section("train/settings.py", "TrainerSettings", "how it is trained"),
    "parallel": Section("train/sharding.py", "ParallelSettings", "several processes"),
    "machine": Section("train/plan.py", "MachineSettings", "the machine that --plan reckons with"),
    "eval": Section("circuit/evaluation.py", "EvalSettings", "what is measured"),
    "trace": Section("circuit/attribution.py", "TraceSettings", "the attribution graph"),
    "features": Section("circuit/features.py", "FeatureSettings", "the features' dashboards"),
    "view": Section("circuit/viewer/server.py", "ViewSettings", "the local page"),
    "wandb": Section("launch/tracking.py", "WandbSettings", "Weights & Biases"),
    "demo": Section("launch/settings.py", "DemoSettings", "how much the demonstration does"),
    "launcher": Section("launch/settings.py", "LauncherSettings", "where the runs of a sweep run"),
    "world": Section("data/world/settings.py", "WorldSettings", "the bundled world (model=world)", shorthand="size"),
    "stdlib": Section("data/stdlib.py", "StdlibSettings", "the bundled Python model (model=stdlib)", shorthand="size"),
}
SOURCES = ("model", "dataset", "world", "stdlib")
"""The sections that say which model and which text."""

ALIASES = {"tokens": "store.tokens", "from": "format"}
"""Short names of settings, wherever the verb takes the setting."""


class Verb(NamedTuple):
    """One command."""

    summary: str
    """What it does, for the list of verbs."""
    module: str
    """The module of `launch/` whose `run(job)` does it."""
    settings: str
    """The class in launch/settings.py with its top-level settings."""
    sections: tuple[str, ...]
    """The groups that it takes."""
    examples: tuple[str, ...]
    """Commands to copy."""


VERBS = {
    "demo": Verb(
        "everything, on the bundled world, on a CPU",
        "demo",
        "DemoVerbSettings",
        ("demo", "world", "store", "transcoder", "trainer", "trace", "features", "wandb"),
        ("crosslace demo run=runs/demo", "crosslace demo experiment=demo_quick run=runs/quick"),
    ),
    "cache": Verb(
        "run a language model over text and store its activations",
        "cache",
        "CacheSettings",
        (*SOURCES, "store"),
        (
            "crosslace cache model=world dataset=world store=stores/world tokens=1M",
            "crosslace cache model=gpt2 dataset=pile store=stores/gpt2 tokens=100M",
        ),
    ),
    "train": Verb(
        "train a transcoder on a store, or on activations as they stream",
        "train",
        "TrainSettings",
        ("store", "transcoder", "trainer", "parallel", "machine", *SOURCES, "wandb"),
        (
            "crosslace train store=stores/gpt2 transcoder=clt run=runs/clt transcoder.features=24576",
            "crosslace train --plan experiment=llama32_1b_clt parallel.features=8",
        ),
    ),
    "eval": Verb(
        "measure a transcoder on held-out text",
        "evaluate",
        "EvalVerbSettings",
        ("eval", "store", *SOURCES),
        ("crosslace eval run=runs/clt",),
    ),
    "features": Verb(
        "make the dashboards of a transcoder's features",
        "features",
        "FeaturesSettings",
        ("features", *SOURCES),
        ("crosslace features run=runs/clt",),
    ),
    "trace": Verb(
        "trace the circuit behind a prompt's next token",
        "trace",
        "TraceVerbSettings",
        ("trace", *SOURCES),
        ('crosslace trace run=runs/clt prompt="the capital of the state containing Dallas is" slug=dallas',),
    ),
    "steer": Verb(
        "set features and see what the model says then",
        "steer",
        "SteerSettings",
        SOURCES,
        ('crosslace steer run=runs/clt prompt="..." set="[{layer: 1, position: 7, feature: 310, times: 0}]"',),
    ),
    "view": Verb(
        "look at graphs and features in a local page",
        "view",
        "ViewVerbSettings",
        ("view",),
        ("crosslace view run=runs/clt",),
    ),
    "export": Verb(
        "write a transcoder in another program's format",
        "exchange",
        "ExportSettings",
        SOURCES,
        ("crosslace export run=runs/clt to=circuit-tracer out=exported/clt",),
    ),
    "import": Verb(
        "read a transcoder from another program's format into a run",
        "exchange",
        "ImportSettings",
        SOURCES,
        ("crosslace import from=circuit-tracer path=exported/clt run=runs/imported",),
    ),
    "sweep": Verb(
        "train and measure every combination of settings",
        "sweep",
        "SweepSettings",
        ("launcher", "store", "transcoder", "trainer", "parallel", "eval", *SOURCES, "wandb"),
        ("crosslace sweep run=runs/sweep transcoder=clt,plt trainer.target_l0=8,16,32",),
    ),
    "report": Verb(
        "draw one page about one run, several, or a sweep",
        "report",
        "ReportSettings",
        (),
        ("crosslace report run=runs/sweep", "crosslace report runs/clt runs/plt"),
    ),
}
