"""`crosslace cache`: run the model over text and store what its layers read and write; and `crosslace store`: what a
store holds, whether every byte is what was written, and what is left of one cut off."""

from pathlib import Path

from ...conf import SOURCES
from ...data.errors import UserError
from ..terminal import Closing, table
from ..workspace import Job, open_corpus, open_model, runs, wait_until


def run(job: Job) -> Closing:
    """Fill a store, or go on with one that was cut off."""
    if job.verb == "store":
        return look(job)
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
    corpus = open_corpus(job, model)
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
    """Describe a store; check it, or remove it where it is incomplete, when asked to."""
    from ...data.models import described
    from ...data.store import ActivationStore, Place, is_complete, read_json

    top = job.top
    place = Place(top.path)
    held = read_json(place, "zarr.json")
    if held is None:
        raise UserError(f"there is no store at {top.path}; make one with `crosslace cache store={top.path}`")
    facts = held["attributes"]
    if not is_complete(top.path):
        files = place.sizes("")
        done = sum(name.startswith(".progress/") and name.endswith(".npz") for name in files)
        if top.remove:
            for name in {name.split("/")[0] for name in files}:
                place.remove(name)
            return Closing("removed what was incomplete", notes=[f"{len(files)} files, {done} finished windows"])
        left = f"{top.path} is incomplete: {done} windows of {facts.get('tokens')} rows are done"
        return Closing(
            left, next=["the same `crosslace cache` goes on", f"crosslace store path={top.path} remove=true"]
        )
    if top.remove:
        raise UserError(f"{top.path} is whole, and only what is incomplete is removed here")
    rows = []
    for split in facts["tokens"]:
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
