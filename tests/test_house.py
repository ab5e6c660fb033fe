"""The house's own rules, each for the whole tree: who may import whom, how large it gets, what it must never hold."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crosslace.data.compiler import find_compiler

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
FILES_IN_A_FOLDER = 12
LINES_IN_A_FILE = 450

UPWARDS = {("circuit/graph/graph", "circuit/formats"), ("circuit/graph/graph", "circuit/viewer")}
"""What runs upwards: `Graph.to_neuronpedia` and `Graph.show`, which spare a user to know the modules that do it."""


class Import(NamedTuple):
    """One import inside the package."""

    source: str
    """The module that imports, as `train/loss/objective`; a folder's `__init__` is called by its folder."""
    target: str
    """The module that is imported."""
    offered: bool
    """Whether the name is one that the folder's `__init__` gives on."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """`train/loss` for train/loss/__init__.py, `train/loss/objective` for the module."""
    return name_of(path).removesuffix(".py").removesuffix("__init__").rstrip("/")


NAMES = {module_of(path): path for path in MODULES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports() -> tuple[Import, ...]:
    """Every import inside the package: those inside functions, and those for type checkers, count like the others."""
    return tuple(one for path in MODULES for one in imports_of(path))


def imports_of(path: Path) -> list[Import]:
    here, found = path.relative_to(ROOT).parts[:-1], []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = "/".join((*here[: len(here) - node.level + 1], *(node.module or "").split("."))).rstrip("/")
            for alias in node.names:
                inner = f"{base}/{alias.name}".lstrip("/")
                door = base not in NAMES or NAMES[base].name == "__init__.py"
                offered = door and (inner not in NAMES or alias.name in offered_by(base))
                found.append(Import(module_of(path), inner if inner in NAMES else base, offered))
    return [one for one in found if one.target != one.source]


@cache
def offered_by(folder: str) -> frozenset[str]:
    """The names that a folder's `__init__` gives on."""
    path = NAMES.get(folder)
    if path is None or path.name != "__init__.py":
        return frozenset()
    nodes = [node for node in tree_of(path).body if isinstance(node, ast.ImportFrom)]
    return frozenset(alias.asname or alias.name for node in nodes for alias in node.names)


def foreign_names(path: Path) -> set[str]:
    """What a module imports by absolute names."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def room_of(module: str) -> str:
    return module.split("/")[0]


def floor_of(module: str) -> str:
    """The folder of a room that a module belongs to; a file that lies in the room itself stands for itself."""
    return "/".join(module.split("/")[:2])


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """The groups of nodes that reach each other."""
    after: dict[str, set[str]] = {}
    for source, target in edges:
        after.setdefault(source, set()).add(target)

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for node in after.get(waiting.pop(), ()):
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
        return seen

    reach = {node: reached(node) for node in after}
    groups = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in after}
    return sorted(sorted(group) for group in groups if group)


def test_rooms_import_one_way() -> None:
    for one in imports():
        source, target = room_of(one.source), room_of(one.target)
        if source in ROOMS:
            allowed = {*ROOMS[: ROOMS.index(source) + 1], ""} | ({"conf"} if source == "launch" else set())
        else:
            allowed = {"conf"} if source == "conf" else set(ROOMS[:3])
        assert target in allowed, one


def test_floors_of_a_room_import_one_way() -> None:
    edges = {
        (floor_of(one.source), floor_of(one.target))
        for one in imports()
        if room_of(one.source) == room_of(one.target) and (one.source, floor_of(one.target)) not in UPWARDS
    }
    assert not list(circles({(a, b) for a, b in edges if a != b}))


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    edges = {(one.source, one.target) for one in imports() if (one.source, floor_of(one.target)) not in UPWARDS}
    assert not list(circles(edges))


def test_a_floor_is_entered_by_its_door() -> None:
    """Code outside a folder takes the names that its `__init__` gives on, and none past it."""
    past = [
        f"{one.source} imports {one.target}"
        for one in imports()
        if one.target.count("/") >= 2 and floor_of(one.source) != floor_of(one.target) and not one.offered
    ]
    assert not past


def test_imports_inside_the_package_are_relative() -> None:
    for path in MODULES:
        assert "crosslace" not in foreign_names(path), path


def test_only_launch_knows_hydra_trackers_and_the_terminal() -> None:
    for path in MODULES:
        if room_of(module_of(path)) != "launch":
            assert not foreign_names(path) & {"hydra", "omegaconf", "wandb", "rich"}, path


def test_every_folder_says_what_it_holds() -> None:
    for path in MODULES:
        if path.name == "__init__.py":
            assert ast.get_docstring(tree_of(path)), path


def test_folders_and_files_stay_small() -> None:
    folders = {path.parent for path in MODULES}
    large = {name_of(folder) for folder in folders if len(list(folder.glob("*.py"))) - 1 > FILES_IN_A_FOLDER}
    long = {name_of(path) for path in TRACKED if path.suffix == ".py" and lines(path) > LINES_IN_A_FILE}
    assert not large and not long


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


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
        capped = any(s.operator in ("<", "<=", "==") for s in requirement.specifier)
        assert capped == (requirement.name == "transformers"), "caps stand in constraints.txt"
        assert any(s.operator == ">=" for s in requirement.specifier), requirement


def test_every_foreign_package_is_declared() -> None:
    """What the package imports is a dependency, or an extra where it is only imported on demand."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    named = {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in wanted}
    known = {"hydra_core": "hydra", "pyyaml": "yaml", "hydra_submitit_launcher": "submitit"}
    declared = {known.get(name, name) for name in named}
    found = set().union(*map(foreign_names, MODULES)) - set(sys.stdlib_module_names) - {""}
    assert {name.lower() for name in found} <= declared | {"google_crc32c"}


def test_public_names_load_on_first_use() -> None:
    code = (
        "import sys, crosslace; assert 'torch' not in sys.modules; assert 'Graph' in crosslace.__all__; crosslace.Graph"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def tracked_files() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


def built_wheel(tmp_path: Path, home: str = "") -> Path:
    """A wheel of what git knows."""
    tree = tmp_path / "tree"
    for name in tracked_files():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    out = tmp_path / "wheel"
    out.mkdir()
    environment = os.environ | {"CROSSLACE_HOME": home}
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=tree, check=True, capture_output=True, env=environment)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_code_presets_and_the_viewers_files(tmp_path: Path) -> None:
    tracked = tracked_files()
    wheel = zipfile.ZipFile(built_wheel(tmp_path, home="https://example.org/crosslace"))
    names = set(wheel.namelist())
    about = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Project-URL: Repository, https://example.org/crosslace\n" in about
    links = re.findall(r"\]\(([^)#]+)", about)
    assert "https://example.org/crosslace/docs/images/dallas.svg" in links
    assert [link for link in links if not link.startswith("https://")] == []
    here = {
        f"crosslace/{name_of(path)}"
        for path in [*MODULES, *(ROOT / "conf").rglob("*.yaml")]
        if name_of(path) in tracked
    }
    assert here <= names
    static = {f"crosslace/{name}" for name in tracked if name.startswith("circuit/viewer/static/")}
    assert static <= names
    assert {f"crosslace/{name}" for name in tracked if name.startswith("data/worlds/world/shipped/")} <= names
    assert not any(name.startswith(("crosslace/tests", "tests/")) for name in names)
    if find_compiler() is not None:
        assert any(re.fullmatch(r"crosslace/data/built/sparse-\w+\.so", name) for name in names)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_installed_wheel_runs_the_demonstration_outside_the_repository(tmp_path: Path) -> None:
    """In an environment that was empty: what is not declared is not there."""
    wheel, home = built_wheel(tmp_path), tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    pip = [home / "bin" / "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    for wanted in ("torch", wheel):  # torch first: a build for the CPU alone, where one is at hand
        done = subprocess.run([*pip, wanted], capture_output=True, text=True, check=False)
        if done.returncode and re.search("No matching distribution|Connection|resolve|timed out", done.stderr):
            pytest.skip(f"no packages are to be had here: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
    (tmp_path / "empty").mkdir()
    environment = {
        "HOME": str(tmp_path),
        "PATH": str(home / "bin"),
        "WANDB_MODE": "disabled",
        "CXX": "no-compiler",
        "OMP_NUM_THREADS": "1",
    }

    def inside(*command: str) -> str:
        options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path / "empty"}
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = (
        "import crosslace; from crosslace.train.sparse import cpu; print(crosslace.__file__, cpu.load() is not None)"
    )
    found, ready = inside(str(home / "bin" / "python"), "-c", where).split()
    assert found.startswith(str(home))
    assert ready == str(find_compiler() is not None), "kernels are ready, without a compiler where it is used"
    inside(str(home / "bin" / "crosslace"), "demo", "experiment=demo_quick", "run=demo")
    assert (tmp_path / "empty" / "demo" / "report.html").is_file()


def test_the_architecture_page_names_every_floor_and_no_file_that_is_not_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "images" / "house.svg").read_text(encoding="utf-8")
    floors = {floor_of(name) for name, path in NAMES.items() if path.name == "__init__.py" and "/" in name}
    missing = [floor for floor in floors if f"`{floor}/`" not in page or f">{floor.split('/')[1]}<" not in picture]
    assert not missing, "run `python docs/draw_house.py`"
    named = re.findall(r"`((?:data|train|circuit|launch|conf|tests|docs)/[\w/.]*)`", page)
    assert [name for name in named if not (ROOT / name).exists()] == []
