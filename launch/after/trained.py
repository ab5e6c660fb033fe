"""`crosslace train`: the training, then what `then` names."""

from pathlib import Path

from ..terminal import Closing
from ..verbs import train
from ..workspace import Job
from .follow import follow, refuse_unready


def run(job: Job) -> Closing:
    """Train; where the training came to its end and more is asked for, go on."""
    if job.top.plan or not job.section("then").do:
        return train.run(job)
    refuse_unready(job)
    closing = train.run(job)
    if closing.code:
        return closing
    closing.next = []
    if job.is_main:
        closing.show()
    return follow(job, Path(job.top.run))
