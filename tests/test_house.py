"""The house's own rules: which room may import which, what is packaged, what the tree must never hold."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("data", "train", "circuit", "launch")
MODULES = [path for room in (*ROOMS, "conf") for path in sorted((ROOT / room).rglob("*.py"))] + [ROOT / "__init__.py"]
TRACKED = [
    *MODULES,
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "conf").rglob("*.yaml")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")),
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a module's relative imports reach, those inside functions included."""
    here = path.relative_to(ROOT).with_suffix("").parts
    package = here if path.name == "__init__.py" else here[:-1]
    package = package[:-1] if path.name == "__init__.py" and package[-1] == "__init__" else package
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            full = (*base, *(node.module or "").split(".")) if node.module else base
            rooms |= {full[0]} if full else {alias.name for alias in node.names}
    return rooms & {*ROOMS, "conf"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    allowed = {
        **{name: set(ROOMS[: i + 1]) for i, name in enumerate(ROOMS)},
        "conf": set(),
        "__init__.py": set(ROOMS[:3]),
    }[room]
    if room == "launch":
        allowed = allowed | {"conf"}
    assert imported_rooms(path) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_inside_the_package_are_relative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(name.split(".")[0] == "crosslace" for name in names)


def test_only_launch_knows_hydra_trackers_and_the_terminal() -> None:
    for path in MODULES:
        if path.relative_to(ROOT).parts[0] == "launch":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            tops = {name.split(".")[0] for name in names}
            assert not tops & {"hydra", "omegaconf", "wandb", "rich"}, path


def test_no_pickle_no_path_of_a_machine_no_open_server() -> None:
    words = [
        "pickle" + ".load",
        "pickle" + ".dump",
        "torch" + ".load(",
        "/" + "root/",
        "/" + "home/",
        "0.0" + ".0.0",
        "/" + "work/",
        "TO" + "DO",
    ]
    for path in TRACKED:
        text = path.read_text(encoding="utf-8")
        found = [word for word in words if re.search(rf"(?<![\w.]){re.escape(word)}", text)]
        assert not found, f"{path} holds {found}"


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    there = {
        ".".join(("crosslace", *path.parent.relative_to(ROOT).parts))
        for room in (*ROOMS, "conf")
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert listed == there | {"crosslace"}


def test_constraints_lie_within_the_bounds() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = dict(line.partition(";")[0].split("==") for line in lines if not line.startswith("#"))
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(exact[requirement.name.lower()]), requirement
        assert any(s.operator in ("<", "<=", "==") for s in requirement.specifier) or requirement.name == "fsspec"


def test_public_names_load_on_first_use() -> None:
    code = (
        "import sys, crosslace; assert 'torch' not in sys.modules; assert 'Graph' in crosslace.__all__; crosslace.Graph"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_wheel_holds_code_presets_and_the_viewers_files(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in tracked:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    out = tmp_path / "wheel"
    out.mkdir()
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=tree, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(out.glob("*.whl"))).namelist())
    here = {
        f"crosslace/{name_of(path)}"
        for path in [*MODULES, *(ROOT / "conf").rglob("*.yaml")]
        if name_of(path) in tracked
    }
    assert here <= names
    static = {f"crosslace/{name}" for name in tracked if name.startswith("circuit/viewer/static/")}
    assert static <= names
    assert not any(name.startswith(("crosslace/tests", "tests/")) for name in names)
