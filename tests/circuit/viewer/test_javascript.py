"""The page's own unit tests, by node's test runner."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_pages_functions():
    files = sorted(map(str, Path(__file__).parent.glob("js/*.test.mjs")))
    done = subprocess.run(["node", "--test", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"# pass {done.stdout.count('# Subtest:')}" in done.stdout or "fail 0" in done.stdout
