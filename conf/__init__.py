"""The registry of configuration: which settings class describes which group, and which verb takes which.

The classes themselves stand in the rooms, at the top of the module that they configure; here they are only named,
so that reading this costs no import. The YAML files beside it are Hydra's groups. A verb's root configuration is made
of its own settings and its sections, each with the preset named here (`launch/settings/compose.py`); `schema` in a
group is the settings class itself.
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
    preset: str = "schema"
    """The preset that is taken where none is named; `schema` is the settings class's own defaults."""


SECTIONS = {
    "model": Section(
        "data/models/language_model.py", "ModelSettings", "the language model", shorthand="name", preset="world"
    ),
    "dataset": Section("data/text/dataset.py", "DatasetSettings", "the text", shorthand="name", preset="world"),
    "store": Section(
        "data/harvest/settings.py", "HarvestSettings", "the cached activations", shorthand="path", preset="default"
    ),
    "transcoder": Section("train/settings.py", "TranscoderSettings", "the dictionary that is trained", preset="clt"),
    "trainer": Section("train/settings.py", "TrainerSettings", "how it is trained", preset="default"),
    "parallel": Section("train/parallel/mesh.py", "ParallelSettings", "several processes"),
    "machine": Section("train/planning/plan.py", "MachineSettings", "the machine that --plan reckons with"),
    "eval": Section("circuit/judge/evaluation.py", "EvalSettings", "what is measured", preset="default"),
    "trace": Section("circuit/attribution/tracer.py", "TraceSettings", "the attribution graph", preset="default"),
    "features": Section("circuit/features/gather.py", "FeatureSettings", "the features' dashboards"),
    "labels": Section("circuit/labelling/study.py", "LabelSettings", "names for features, and what they are worth"),
    "neuronpedia": Section("circuit/formats/neuronpedia.py", "NeuronpediaSettings", "graphs for Neuronpedia"),
    "view": Section("circuit/viewer/server.py", "ViewSettings", "the local page"),
    "wandb": Section("launch/workspace/tracking.py", "WandbSettings", "Weights & Biases"),
    "tensorboard": Section(
        "launch/workspace/tracking.py", "TensorBoardSettings", "TensorBoard's event files", shorthand="on"
    ),
    "demo": Section("launch/settings/verb_settings.py", "DemoSettings", "how much the demonstration does"),
    "then": Section("launch/settings/verb_settings.py", "ThenSettings", "what follows a training", shorthand="do"),
    "launcher": Section(
        "launch/settings/verb_settings.py", "LauncherSettings", "where the runs of a sweep run", preset="local"
    ),
    "world": Section(
        "data/worlds/world/sizes.py", "WorldSettings", "the bundled world (model=world)", shorthand="size"
    ),
    "stdlib": Section(
        "data/worlds/stdlib.py", "StdlibSettings", "the bundled Python model (model=stdlib)", shorthand="size"
    ),
}
SOURCES = ("model", "dataset", "world", "stdlib")
"""The sections that say which model and which text."""

ALIASES = {"tokens": "store.tokens", "from": "format", "sweep.stack": "stack"}
"""Short names of settings, wherever the verb takes the setting."""


class Verb(NamedTuple):
    """One command."""

    summary: str
    """What it does, for the list of verbs."""
    module: str
    """The module of the package whose `run(job)` does it."""
    settings: str
    """The class in launch/settings/verb_settings.py with its top-level settings."""
    sections: tuple[str, ...]
    """The groups that it takes."""
    examples: tuple[str, ...]
    """Commands to copy."""
    smaller: str = ""
    """What to change when memory runs out."""


VERBS = {
    "demo": Verb(
        "everything, on the bundled world or on SmolLM2, on a CPU",
        "launch.verbs.demo",
        "DemoVerbSettings",
        (
            "demo",
            "model",
            "world",
            "store",
            "transcoder",
            "trainer",
            "eval",
            "trace",
            "features",
            "wandb",
            "tensorboard",
        ),
        (
            "crosslace demo run=runs/demo",
            "crosslace demo experiment=demo_quick run=runs/quick",
            "crosslace demo model=smollm2 run=runs/smollm2",
        ),
        "take experiment=demo_quick",
    ),
    "world": Verb(
        "the bundled world: how well it answers, or train it again",
        "launch.verbs.world",
        "WorldVerbSettings",
        ("world",),
        ("crosslace world", "crosslace world world=tiny rebuild=true out=tiny"),
    ),
    "cache": Verb(
        "run a language model over text and store its activations",
        "launch.verbs.cache",
        "CacheSettings",
        (*SOURCES, "store", "machine"),
        (
            "crosslace cache model=world dataset=world store=stores/world tokens=1M",
            "crosslace cache model=gpt2 dataset=pile store=stores/gpt2 tokens=100M",
            "crosslace cache --plan experiment=gemma2_2b_plt",
        ),
        "lower store.batch_tokens or store.memory, or take model.dtype=bfloat16",
    ),
    "store": Verb(
        "describe a store, verify it, list those in a folder, or remove what is incomplete",
        "launch.verbs.cache",
        "StoreVerbSettings",
        (),
        ("crosslace store stores", "crosslace store stores/gpt2", "crosslace store stores/gpt2 verify=true"),
    ),
    "train": Verb(
        "train a transcoder on a store, or on activations as they stream",
        "launch.after.trained",
        "TrainSettings",
        ("store", "transcoder", "trainer", "parallel", "machine", *SOURCES, "wandb", "tensorboard", "then"),
        (
            "crosslace train store=stores/gpt2 transcoder=clt run=runs/clt transcoder.features=24576",
            "crosslace train store=stores/gpt2 run=runs/clt then=[eval,features,trace] eval.prompts=10",
            "crosslace train --plan experiment=llama32_1b_clt parallel.features=8",
        ),
        (
            "raise trainer.accumulate, lower trainer.batch or transcoder.features,"
            " or share the features over processes (parallel.features)"
        ),
    ),
    "eval": Verb(
        "measure a transcoder on held-out text",
        "launch.verbs.evaluate",
        "EvalVerbSettings",
        ("eval", "store", *SOURCES),
        ("crosslace eval run=runs/clt",),
        "lower eval.batch or eval.max_nodes, or take model.dtype=bfloat16",
    ),
    "features": Verb(
        "make the dashboards of a transcoder's features",
        "launch.verbs.features",
        "FeaturesSettings",
        ("features", "labels", *SOURCES),
        (
            "crosslace features run=runs/clt",
            "crosslace features run=runs/clt labels.score=true",
            "crosslace features run=runs/clt labels.explainer=local labels.model=smollm2 labels.features=20",
        ),
        "lower features.tokens or features.top, name some features.layers, or take model.dtype=bfloat16",
    ),
    "trace": Verb(
        "trace the circuit behind a prompt's next token",
        "launch.verbs.trace",
        "TraceVerbSettings",
        ("trace", *SOURCES),
        ('crosslace trace run=runs/clt prompt="the capital of the state containing Dallas is" slug=dallas',),
        "lower trace.batch, set trace.max_nodes, take trace.edges=top-k, or model.dtype=bfloat16",
    ),
    "steer": Verb(
        "set features and see what the model says then",
        "launch.verbs.steer",
        "SteerSettings",
        SOURCES,
        ('crosslace steer run=runs/clt prompt="..." set="[{layer: 1, position: 7, feature: 310, times: 0}]"',),
        "shorten the prompt, or take model.dtype=bfloat16",
    ),
    "compare": Verb(
        "say what two graphs share and what they do not",
        "launch.verbs.view",
        "CompareSettings",
        (),
        ("crosslace compare run=runs/clt first=dallas second=seattle by=tokens",),
    ),
    "view": Verb(
        "look at graphs and features in a local page",
        "launch.verbs.view",
        "ViewVerbSettings",
        ("view", "model", "world", "stdlib"),
        ("crosslace view run=runs/clt",),
    ),
    "export": Verb(
        "write a transcoder in another program's format",
        "launch.verbs.exchange",
        "ExportSettings",
        ("neuronpedia", *SOURCES),
        (
            "crosslace export run=runs/clt to=circuit-tracer out=exported/clt",
            "crosslace export run=runs/clt to=neuronpedia out=exported/graphs neuronpedia.scan=gemma-2-2b",
        ),
    ),
    "publish": Verb(
        "make a run ready for the hub: files, model card; upload it when told to",
        "launch.publishing.publish",
        "PublishSettings",
        SOURCES,
        ("crosslace publish run=runs/clt out=published/my-clt license=mit",),
    ),
    "import": Verb(
        "read a transcoder from another program's format into a run",
        "launch.verbs.exchange",
        "ImportSettings",
        SOURCES,
        ("crosslace import from=circuit-tracer path=exported/clt run=runs/imported",),
    ),
    "sweep": Verb(
        "train and measure every combination of settings",
        "launch.sweeps.sweep",
        "SweepSettings",
        ("launcher", "store", "transcoder", "trainer", "parallel", "eval", *SOURCES, "wandb", "tensorboard", "then"),
        ("crosslace sweep run=runs/sweep transcoder=clt,plt trainer.target_l0=8,16,32",),
    ),
    "seeds": Verb(
        "say which edges and paths of a graph hold over trainings with other seeds",
        "launch.overview.across",
        "SeedsSettings",
        ("trace", *SOURCES),
        ("crosslace seeds run=runs/sweep slug=dallas", "crosslace seeds runs/seed-0 runs/seed-1 slug=dallas"),
    ),
    "report": Verb(
        "draw one page about one run, several, or a sweep",
        "launch.overview.report",
        "ReportSettings",
        (),
        (
            "crosslace report run=runs/sweep",
            "crosslace report runs/clt runs/plt",
            'crosslace report run=runs/sweep pick="min nmse where l0<=16 and dead<0.05"',
        ),
    ),
    "runs": Verb(
        "list runs and how they stand, or compare the settings of two",
        "launch.overview.list",
        "RunsSettings",
        (),
        ("crosslace runs", 'crosslace runs run=runs where="l0<=16 and dead<0.05"', "crosslace runs runs/clt runs/plt"),
    ),
}
