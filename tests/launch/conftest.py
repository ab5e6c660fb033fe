"""A finished quick demo, made once for all of these tests: its runs are what every other verb works on."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from crosslace.launch.cli.main import main
from filelock import FileLock

QUICK = ["experiment=demo_quick", "wandb.mode=disabled"]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def cache(request: pytest.FixtureRequest):
    """The bundled models are built once for all test runs, and not in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLACE_CACHE", str(request.config.cache.mkdir("crosslace")))
        yield


@pytest.fixture
def crosslace(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command in this process."""

    def run(*words: object) -> Ended:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return run


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, cache) -> Path:
    """The folder of a finished quick demo; not to be written to."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    with FileLock(shared / "demo.lock"):
        if not (shared / "demo" / "summary.json").is_file():
            assert main(["demo", *QUICK, f"run={shared / 'demo'}"]) == 0
    return shared / "demo"
