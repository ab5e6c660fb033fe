"""`crosslace world`: the bundled world, how well it answers; or train it again."""

from pathlib import Path

from ...data.errors import UserError
from ..terminal import Closing, table
from ..workspace import Job, runs


def run(job: Job) -> Closing:
    """Open the world, or make it anew; the shares of questions that it answers."""
    from ...data.worlds import World, build_world, pack_world

    out = Path(job.top.out) if job.top.out else None
    if out is not None:
        if out.exists():
            raise UserError(f"{out} is there already; name a new folder")
        runs.writable(out)
    world = World.load(build_world(job.section("world"), job.progress, rebuild=job.top.rebuild))
    if out is not None:
        pack_world(world.folder, out)
    record = world.record
    rows = [
        (family, record["splits"]["held_out"][family], right, record["accuracy"]["train"][family])
        for family, right in record["accuracy"]["held_out"].items()
    ]
    return Closing(
        "the world",
        tables=[table("questions answered", ("family", "held out", "answered", "of those in training"), rows)],
        notes=[
            f"trained in {record['seconds']['cpu']:.0f} CPU seconds; it answers with its weights rounded to 16 bits"
        ],
        wrote=[
            (str(world.folder), "the model, ready to be used"),
            *([(str(out), "the same as shipped")] if out else []),
        ],
        next=["crosslace cache model=world dataset=world store=stores/world tokens=200K"],
    )
