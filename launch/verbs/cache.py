"""`crosslace cache`: run the model over text and store what its layers read and write; and `crosslace store`: what a
store holds, whether every byte is what was written, and what is left of one cut off."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...conf import SOURCES
from ...data.errors import UserError
from ..terminal import Closing, table
from ..workspace import Job, open_corpus, open_model, runs, wait_until

if TYPE_CHECKING:
    from ...data.store import Place


def run(job: Job) -> Closing:
    """Fill a store, or go on with one that was cut off."""
    if job.verb == "store":
        return look(job)
    if job.top.plan:
        from .plan_run import run_cache

        return run_cache(job)
    from ...data.models import described
    from ...data.store import ActivationStore

    path = job.store_path
    fill(job)
    store = ActivationStore.open(path)
    rows = [("rows", len(store)), ("layers", store.n_layers), ("width", store.d_model), ("dtype", str(store.dtype))]
    rows += described(store.attributes.get("masked", {}))
    return Closing(
        "cached",
        tables=[table("store", ("", "value"), rows)],
        wrote=[(path, "the store")],
        next=[f"crosslace train store={path} run=runs/{Path(path).name}"],
    )


def fill(job: Job) -> None:
    """Write the store that the settings name; ends at once where it is whole."""
    from ...data.harvest import harvest
    from ...data.store import is_complete

    settings = job.section("store")
    if "://" not in settings.path:
        runs.writable(Path(settings.path))
    model = open_model(job)
    corpus = open_corpus(job, model, keep=True)
    whole = harvest(model, corpus, settings, job.progress, job.process.rank, job.process.count)
    if job.is_main and "://" not in settings.path:
        remember(Path(settings.path), job)
    if not whole and job.process.count == 1:
        raise UserError(f"{settings.path} is not whole yet; give the same command again to go on")
    if not whole:
        wait_until(lambda: is_complete(settings.path))


def remember(store: Path, job: Job) -> None:
    """Keep beside the store which model and text it came from, so that training need not be told again."""
    runs.write_yaml(store / "config.yaml", {name: job.config.values[name] for name in (*SOURCES, "store")})


def look(job: Job) -> Closing:
    """Describe a store, or list those in a folder; check it, or remove what is incomplete, when asked to."""
    from ...data.store import Place, read_json

    top = job.top
    content = read_json(Place(top.path), "zarr.json")
    if content is None:
        found = sorted({path.parent for path in Path(top.path).rglob("zarr.json") if is_store(path)})
        if not found:
            raise UserError(f"there is no store at {top.path}; make one with `crosslace cache store={top.path}/NAME`")
        return list_stores(found, top.path, top.remove)
    facts = content["attributes"]
    if facts.get("complete"):
        return describe(job, facts)
    done, files = finished(Place(top.path))
    if top.remove:
        remove(Place(top.path))
        return Closing("removed what was incomplete", notes=[f"{files} files, {done} finished windows"])
    left = f"{top.path} is incomplete: {done} windows of {facts.get('tokens')} rows are done"
    return Closing(left, next=["the same `crosslace cache` goes on", f"crosslace store {top.path} remove=true"])


def is_store(facts: Path) -> bool:
    """Is this zarr.json that of a store, and not of a group or array inside one?"""
    from ...data.layout import FORMAT

    return f'"{FORMAT}"' in facts.read_text(encoding="utf-8", errors="replace")


def finished(place: "Place") -> tuple[int, int]:
    """Windows that are done in an incomplete store, and its files."""
    files = place.sizes("")
    return sum(name.startswith(".progress/") and name.endswith(".npz") for name in files), len(files)


def remove(place: "Place") -> None:
    """All that is in a store, unless somebody is writing it."""
    from ...data.store import StoreLock

    for name in place.sizes(".progress"):
        if "/lock-" in name:
            lock = StoreLock(place, name.removesuffix(".note"))
            lock.take()
            lock.release()
    for name in {name.split("/")[0] for name in place.sizes("")}:
        place.remove(name)


def list_stores(found: list[Path], top: str, removing: bool) -> Closing:
    """The stores of a folder, and how each stands; the incomplete ones removed when asked to."""
    from ...data.layout import VERSION
    from ...data.store import Place, read_json
    from ...data.units import format_bytes

    rows, removed = [], 0
    for path in found:
        place = Place(path)
        facts = (read_json(place, "zarr.json") or {})["attributes"]
        whole = "whole" if facts.get("version") == VERSION else f"version {facts.get('version')}"
        state = whole if facts.get("complete") else f"incomplete: {finished(place)[0]} windows"
        rows.append(
            (
                str(path.relative_to(top)),
                state,
                ", ".join(f"{sum(stages)} {split}" for split, stages in facts.get("tokens", {}).items()),
                str(facts.get("identity", facts).get("model", {}).get("name")),
                format_bytes(sum(place.sizes("").values())),
            )
        )
        if removing and not facts.get("complete"):
            remove(place)
            removed += 1
    notes = [f"removed {removed} incomplete stores"] if removing else []
    columns = ("store", "state", "rows asked for", "model", "size")
    return Closing("stores", tables=[table(top, columns, rows)], notes=notes)


def describe(job: Job, facts: dict[str, Any]) -> Closing:
    """What a whole store holds; every byte read when asked to."""
    from ...data.models import described
    from ...data.store import ActivationStore

    top = job.top
    if top.remove:
        raise UserError(f"{top.path} is whole, and only what is incomplete is removed here")
    rows = []
    for split in facts.get("tokens", {"train": []}):
        store = ActivationStore.open(top.path, split)
        if top.verify:
            store.verify(job.progress)
        rows.append((split, f"{len(store)} rows, {store.n_layers} layers x {store.d_model}, {facts['dtype']}"))
        rows += [(f"  {what}", words) for what, words in described(store.attributes["masked"])]
    model = facts["identity"].get("model", {})
    notes = [
        f"model {model.get('name')} ({model.get('fingerprint')}), text {facts.get('text')}",
        f"versions {facts.get('versions')}",
    ]
    said = "verified" if top.verify else "described"
    return Closing(said, tables=[table(top.path, ("", ""), rows)], notes=notes)
