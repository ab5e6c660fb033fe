"""`crosslace features`: dashboards of a run's features, and names where the ground truth is known."""

from pathlib import Path

from ..terminal import Closing
from ..workspace import Job, open_corpus, open_replacement, runs, world_of


def run(job: Job) -> Closing:
    """Describe every feature."""
    from ...circuit.features import Labels, build_features

    folder = Path(job.top.run)
    runs.writable(folder)
    model = open_replacement(job, folder)
    world = world_of(model.lm)
    if world is not None:
        from ..known_world import label_features

        labels = Labels.load(folder)
        labels.update(label_features(model, world, job.top.seed, job.progress))
        labels.save(folder)
    build_features(model, open_corpus(job, model.lm), folder, job.section("features"), job.progress)
    sources = [label.source for _, label in Labels.load(folder).items()]
    counts = ", ".join(f"{sources.count(source)} by {source}" for source in sorted(set(sources)))
    return Closing(
        "described",
        notes=[f"names: {counts}"],
        wrote=[(str(folder / "features"), "a dashboard a feature, and names")],
        next=[f'crosslace trace run={folder} prompt="..."', f"crosslace view run={folder}"],
    )
