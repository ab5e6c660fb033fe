"""Every command that README and docs show is run, in a quick form; every Python block that stands by itself too.

Each document has a folder of its own with a world's store and two runs. Quick form: settings from a table are added
after those shown, and a new run gets a new name where the shown one is taken. What cannot run here (several machines,
a server that stays) is composed and checked.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from crosslace.conf.describe import presets
from crosslace.launch.cli.main import main
from crosslace.launch.workspace.job import start

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh", "console", "shell")

WORLD = ["model=world", "dataset=world", "world=tiny"]
TRAIN = [
    *("transcoder.features=32", "transcoder.activation=batchtopk", "transcoder.k=4", "trainer.steps=12"),
    *("trainer.batch=128", "trainer.precision=float32", "trainer.sparsity=tanh", "trainer.target_l0=null"),
    *("trainer.eval_tokens=128", "trainer.calibrate_tokens=256", "wandb.mode=disabled"),
]
EVAL = [
    *("eval.tokens=1200", "eval.calibration_tokens=1000", "eval.prompts=0", "eval.pairs=0"),
    *("eval.layers=false", "eval.controls=false"),
]
QUICK = {
    "demo": ["experiment=demo_quick", "wandb.mode=disabled"],
    "cache": [*WORLD, "tokens=3K", "store.held_out=300", "store.dtype=float16"],
    "train": [*WORLD, *TRAIN, "store.mode=disk", "parallel.data=1", "parallel.features=1"],
    "eval": [*EVAL, "overwrite=true"],
    "features": [
        *("features.tokens=1000", "features.top=2"),
        *("labels.tokens=1000", "labels.held_out=1000", "labels.features=4", "overwrite=true"),
    ],
    "sweep": [*WORLD, *TRAIN, "store.mode=disk", *EVAL],
    "import": WORLD,
}
NEW = ("demo", "train", "sweep", "import")
"""Verbs whose run must be new."""


def commands(document: Path) -> list[str]:
    """The commands of a document's shell blocks, a line each; a trailing backslash joins lines."""
    found = []
    for language, text in BLOCK.findall(document.read_text(encoding="utf-8")):
        if language in SHELL:
            lines = text.replace("\\\n", " ").splitlines()
            found += [line.strip().removeprefix("$ ") for line in lines]
    wanted = re.compile(r"^(crosslace|torchrun|accelerate|python -m crosslace\.launch|make)\b")
    return [" ".join(line.split()) for line in found if wanted.match(line)]


def prepared(folder: Path, demo: Path, words: dict[str, str]) -> None:
    """Lay stores and runs where a command looks for them."""
    if (store := words.get("store")) and not (folder / store).exists():
        (folder / store).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(demo / "store", folder / store)
    run = words.get("run")
    if run and not (folder / run).exists():
        kind = "plt" if "plt" in run else "clt"
        shutil.copytree(demo / kind, folder / run, ignore=shutil.ignore_patterns("checkpoints"))


def named(words: list[str]) -> dict[str, str]:
    """Names and values of overrides."""
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def quick(verb: str, shown: list[str], folder: Path) -> list[str]:
    """The words of a command in its quick form."""
    if "..." in shown:
        shown = [word for word in shown if word != "..."]
    if verb in ("train", "sweep") and not any(word.startswith(("store=", "experiment=")) for word in shown):
        shown = [*shown, "store=stores/quick"]
    if verb == "sweep":  # what is varied stays, but for the values that the tiny world has no room for
        shown = [re.sub(r"^(trainer\.target_l0)=.*", r"\1=3,4", word) for word in shown]
        shown = [re.sub(r"^([^=]+=[^,\[]+,[^,]+),.*", r"\1", word) for word in shown]  # two values show what five would
    varied = {word.partition("=")[0] for word in shown if "," in word.partition("=")[2]} if verb == "sweep" else set()
    if verb == "train" and any(word.startswith("experiment=") for word in shown):
        shown = [*shown, "then.do=[]"]  # presets go on to measure and trace, which their own lines do here
    added = [word for word in QUICK.get(verb, []) if word.partition("=")[0] not in varied]
    words = [word for word in shown if word.partition("=")[0] not in {a.partition("=")[0] for a in added}] + added
    names = named(words)
    if verb in NEW and (folder / names.get("run", "-")).exists():
        words = [f"run={names['run']}-new" if word.startswith("run=") else word for word in words]
    return words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_runs(document: Path, demo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for line in commands(document):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], check=True, capture_output=True)
            continue
        several = words[0] in ("torchrun", "accelerate")
        verb, *shown = words[words.index("crosslace") + 1 :] if "crosslace" in words else words[after_module(words) :]
        if verb.startswith("-") or any(word in ("--help", "-h") for word in shown):
            assert main([verb, *shown]) == 0
            continue
        if "--plan" in shown and "world" not in line:
            assert main([verb, *shown]) in (0, 2), line  # as it stands: 2 where the page says that it does not fit
            continue
        if "--cfg" in shown:
            assert main([verb, *shown]) == 0, line
            continue
        given = quick(verb, shown, tmp_path)
        if verb not in (*NEW, "cache"):
            prepared(tmp_path, demo, named(given))
        if verb in ("train", "sweep"):
            prepared(tmp_path, demo, {"store": start(verb, given).store_path})
        if verb == "view" or several or "://" in line or re.search("hub:|from=gemma", line):
            start(verb, [word for word in given if not word.startswith("--")])
            continue
        code = main([verb, *given])
        assert code == 0, f"{line}\nas {verb} {' '.join(given)}\n{capsys.readouterr().err}"


def after_module(words: list[str]) -> int:
    """Where the verb stands in `... -m crosslace.launch VERB ...`."""
    return words.index("crosslace.launch") + 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_python_block_that_stands_alone_runs(document: Path, demo: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("clt", "plt"):
        shutil.copytree(demo / kind, tmp_path / "runs" / kind, ignore=shutil.ignore_patterns("checkpoints"))
    for number, (language, text) in enumerate(BLOCK.findall(document.read_text(encoding="utf-8"))):
        if language == "python" and text.startswith(("import crosslace", "from crosslace")):
            exec(compile(text, f"{document.name}, block {number}", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_inside_the_repository_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_presets_take_what_the_sizing_page_says() -> None:
    """Every experiment for a real model stands in the table, composes, and plans to take what it says."""
    from crosslace.data.units import parse_bytes
    from crosslace.launch.verbs.plan_run import shape_of
    from crosslace.train.planning import make_plan

    text = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+_(?:clt|plt)) \|(.*)\|$", text, re.MULTILINE))
    real = [name for name in presets("experiment") if not name.startswith(("demo", "smollm2"))]
    assert sorted(rows) == sorted(real)
    for name, row in rows.items():
        processes, parameters, store, ring, peak = (cell.strip() for cell in row.split("|"))
        job = start("train", ["run=r", f"experiment={name}", f"parallel.features={processes}"])
        shape = shape_of(job)
        plan = make_plan(shape, *(job.section(part) for part in ("transcoder", "trainer", "parallel", "machine")))
        scale = {"M": 1e6, "B": 1e9}[parameters[-1]]
        assert plan.parameters == pytest.approx(float(parameters[:-1]) * scale, rel=0.02), name
        settings = job.section("store")
        assert settings.mode == "streaming" and parse_bytes(settings.budget) == parse_bytes(ring.replace(" ", "")), name
        assert plan.store == pytest.approx(parse_bytes(store.replace(" ", "")), rel=0.1), name
        assert plan.device_peak == pytest.approx(parse_bytes(peak.replace(" ", "")), rel=0.1), name
