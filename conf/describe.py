"""Read a settings dataclass's documentation from its source, without importing it.

`crosslace VERB --help` must answer at once, and importing a room means importing torch. So the fields, their
types, defaults and the documentation string after each are read from the syntax tree.
"""

import ast
import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from . import SECTIONS, VERBS

PACKAGE = Path(__file__).resolve().parents[1]


class Setting(NamedTuple):
    """One setting as the user sees it."""

    name: str
    """Its name on the command line, e.g. `trainer.lr`."""
    type: str
    """Its annotation, as written."""
    default: str
    """Its default, as written; empty where there is none."""
    doc: str
    """What it means."""

    @property
    def takes(self) -> str:
        """Its type in words."""
        return " or ".join(_in_words(part.strip()) for part in self.type.split("|"))


def _in_words(annotation: str) -> str:
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "None": "null",
        "list[int]": "a list of whole numbers",
        "list[float]": "a list of numbers",
        "list[str]": "a list of texts",
        "list[dict]": "a list of entries {name: value, ...}",
    }
    return words.get(annotation, annotation)


@cache
def settings_of(module: str, class_name: str, prefix: str = "") -> tuple[Setting, ...]:
    """The fields of `class_name` in the package's file `module` ("train/trainer.py"), in order."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    body = classes[class_name].body
    found = []
    for base in classes[class_name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found += settings_of(module, base.id, prefix)
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        doc = str(after.value.value) if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        found.append(
            Setting(
                prefix + node.target.id,
                ast.unparse(node.annotation),
                _default(node.value, module),
                " ".join(doc.split()),
            )
        )
    return tuple(found)


def _default(node: ast.expr | None, module: str) -> str:
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return {"None": "null", "True": "true", "False": "false"}.get(str(node.value), str(node.value))
    if isinstance(node, ast.Name):
        return _constant(module, node.id) or node.id
    if isinstance(node, ast.Call) and node.args:  # free(...), of train/settings.py
        return _default(node.args[0], module)
    if isinstance(node, ast.Call):  # field(default_factory=...)
        for keyword in node.keywords:
            if keyword.arg == "default_factory":
                made = ast.unparse(keyword.value).removeprefix("lambda: ")
                return {"list": "[]", "dict": "{}"}.get(made, made)
    return _computed(node)


def _computed(node: ast.expr) -> str:
    """A default as a value: `1 << 20` as 1048576, anything but arithmetic as it is written."""
    known = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
    if not all(isinstance(part, known) for part in ast.walk(node)):
        return ast.unparse(node)
    return str(eval(compile(ast.Expression(node), "", "eval")))  # numbers and their operators alone


def _constant(module: str, name: str) -> str | None:
    """The value of a constant that a default names, in its module or in the one it is imported from."""
    for node in ast.parse((PACKAGE / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _computed(node.value)
        if isinstance(node, ast.ImportFrom) and node.level and any(alias.name == name for alias in node.names):
            folder = (PACKAGE / module).parents[node.level - 1]
            path = folder.joinpath(*(node.module or "").split("."))
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            return _constant(str(path.relative_to(PACKAGE)), name)
    return None


def verb_settings(verb: str) -> tuple[Setting, ...]:
    """The settings that stand at the top level of this verb's configuration."""
    return settings_of("launch/settings/verb_settings.py", VERBS[verb].settings)


def section_settings(section: str) -> tuple[Setting, ...]:
    """The settings of one section, named by their path."""
    return settings_of(SECTIONS[section].module, SECTIONS[section].settings, f"{section}.")


@cache
def known_settings(verb: str) -> dict[str, Setting]:
    """All settings that this verb takes, by name."""
    sections = [setting for section in VERBS[verb].sections for setting in section_settings(section)]
    return {setting.name: setting for setting in [*verb_settings(verb), *sections]}


def presets(group: str, own: Sequence[Path] = ()) -> list[str]:
    """The names of a configuration group's presets: the package's, and those in the user's own folders."""
    return sorted({path.stem for folder in (PACKAGE / "conf", *own) for path in (folder / group).glob("*.yaml")})


def preset_file(group: str, name: str, own: Sequence[Path] = ()) -> Path:
    """Where a preset stands; the package's own come first, as on Hydra's search path."""
    places = [folder / group / f"{name}.yaml" for folder in (PACKAGE / "conf", *own)]
    return next((path for path in places if path.is_file()), places[0])


def closest(name: str, known: list[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    for candidates in (known, [k for k in known if k.rpartition(".")[0] == name.rpartition(".")[0]]):
        if match := difflib.get_close_matches(name, candidates, n=1, cutoff=0.75):
            return match[0]
    last = name.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    if same:
        return same[0]
    tails = {k.rpartition(".")[2]: k for k in known}
    match = difflib.get_close_matches(last, list(tails), n=1, cutoff=0.75)
    return tails[match[0]] if match else None
