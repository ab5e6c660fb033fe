"""What people add to a graph, kept in `view.json` beside it: pins, groups, notes, labels, places.

The file is a table of small entries, and an edit names the entries that it changes (None takes one away). So two pages
that edit at once lose nothing unless both change the same entry, and an edit is undone by giving the entries their
earlier values. Entries are keyed by `layer/position/index` of features (other nodes have names of their own, see
`payload.node_keys`), so that they survive a new trace of the prompt.

    pins      node -> true
    members   node -> group           groups  group -> its name
    notes     node or group -> text   places  node or group -> [x, y] in the subgraph
    labels    layer/feature -> text

A label also becomes the run's: `hand` in features/labels.json. What it replaced is kept in `replaced`, and comes back
when the label is taken away.
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from ...data.errors import UserError
from ..features import Label, Labels

FORMAT, VERSION = "crosslace-view", 1
KEY = re.compile(r"[A-Za-z0-9_.:#/-]{1,80}")
FEATURE = re.compile(r"\d{1,6}/\d{1,9}")
MOST_ENTRIES, MOST_TEXT = 20_000, 4_000

Entries = dict[str, dict[str, Any]]
_lock = Lock()


@contextmanager
def _locked(graph: Path) -> Iterator[None]:
    """One edit at a time, of all pages and all servers."""
    with _lock, (graph / "graph.json").open() as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value.strip()) > 0 and len(value) <= MOST_TEXT


def _is_place(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value)
    return numbers and all(math.isfinite(x) and abs(x) < 1e6 for x in value)


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and KEY.fullmatch(value) is not None


SECTIONS: dict[str, Callable[[Any], bool]] = {
    "pins": lambda value: value is True,
    "members": _is_key,
    "groups": _is_text,
    "notes": _is_text,
    "labels": _is_text,
    "places": _is_place,
}


def empty() -> dict[str, Any]:
    """What a graph has that nobody has touched."""
    return {"revision": 0, **{name: {} for name in SECTIONS}}


def read_kept(graph: Path) -> dict[str, Any]:
    """What is kept beside a graph."""
    content = _content(graph)
    return {name: content[name] for name in ("revision", *SECTIONS)}


def edit_kept(graph: Path, run: Path | None, changes: Any, start: Any = None) -> dict[str, Any]:
    """Apply `{section: {key: value or None}}`, and give what is kept then. Labels become the run's as well. `start` are
    entries that a graph begins with, where nobody has touched it yet."""
    changes = checked(changes)
    with _locked(graph):
        content = _content(graph)
        for section, entries in checked(start).items() if start and not content["revision"] else ():
            apply(content[section], entries)
        if run is not None and changes.get("labels"):
            _label_run(run, changes["labels"], content["replaced"])
        for section, entries in changes.items():
            apply(content[section], entries)
            if len(content[section]) > MOST_ENTRIES:
                raise UserError(f"a graph keeps at most {MOST_ENTRIES} {section}")
        content["revision"] += 1
        _write(graph / "view.json", content)
    return {name: content[name] for name in ("revision", *SECTIONS)}


def checked(changes: Any) -> Entries:
    """The changes, or a sentence about what is wrong with them."""
    if not isinstance(changes, dict) or not changes:
        raise UserError(f"an edit names entries of {', '.join(SECTIONS)}")
    for section, entries in changes.items():
        if section not in SECTIONS or not isinstance(entries, dict):
            raise UserError(f"an edit names entries of {', '.join(SECTIONS)}, not {str(section)[:80]!r}")
        for key, value in entries.items():
            if not (FEATURE if section == "labels" else KEY).fullmatch(key):
                raise UserError(f"{section}: {key[:80]!r} names nothing in a graph")
            if value is not None and not SECTIONS[section](value):
                raise UserError(f"{section}: {str(value)[:80]!r} cannot be kept")
    return changes


def apply(table: dict[str, Any], entries: Mapping[str, Any]) -> None:
    """Set entries; None takes one away."""
    for key, value in entries.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value


def _content(graph: Path) -> dict[str, Any]:
    path = graph / "view.json"
    content = empty() | {"replaced": {}}
    if not path.exists():
        return content
    try:
        found = json.loads(path.read_text("utf-8"))
        known = found["format"] == FORMAT and found["version"] == VERSION
        whole = known and all(isinstance(found[name], dict) for name in (*SECTIONS, "replaced"))
        whole = whole and type(found["revision"]) is int
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); put it right or move it away") from error
    if not whole:
        raise UserError(f"{path} is nothing that this version reads (it reads {FORMAT} version {VERSION})")
    return content | {name: found[name] for name in content}


def _label_run(run: Path, entries: Mapping[str, Any], replaced: dict[str, Any]) -> None:
    """Hand labels of the run. The first one of a feature remembers what it replaced."""
    labels = Labels.load(run)
    for key, text in entries.items():
        layer, feature = map(int, key.split("/"))
        old = labels.label(layer, feature)
        if text is not None:
            replaced.setdefault(key, None if old is None else asdict(old))
            labels.set(layer, feature, Label(text.strip(), "hand"))
        else:
            before = replaced.pop(key, None)
            labels.replace(layer, feature, None if before is None else Label(**before))
    labels.save(run)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Aside and renamed: nobody reads half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps({"format": FORMAT, "version": VERSION, **content}, ensure_ascii=False, indent=1)
    aside.write_text(text, "utf-8")
    aside.replace(path)
