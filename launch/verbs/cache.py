"""`crosslace cache`: run the model over text and store what its layers read and write."""

from pathlib import Path

from ...conf import SOURCES
from ...data.errors import UserError
from ..terminal import Closing, table
from ..workspace import Job, open_corpus, open_model, runs, wait_until


def run(job: Job) -> Closing:
    """Fill a store, or go on with one that was cut off."""
    from ...data.models import described
    from ...data.store import ActivationStore

    path = job.store_path
    fill(job)
    store = ActivationStore.open(path)
    rows = [("rows", len(store)), ("layers", store.n_layers), ("width", store.d_model), ("dtype", str(store.dtype))]
    rows += described(store.attributes.get("masked", {}), len(store))
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
