"""The page's own unit tests, by node's test runner. CI installs it; where there is none they are skipped."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ABSENT = shutil.which("node") is None and not os.environ.get("CI")


@pytest.mark.skipif(ABSENT, reason="node (18 or newer) is not installed, which CI has")
@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("js/*.test.mjs")), ids=lambda path: path.stem)
def test_the_pages_functions(file: Path):
    done = subprocess.run(["node", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"^. pass (\d+)$", done.stdout, re.MULTILINE)
    assert passed and int(passed[1]) == file.read_text("utf-8").count("\ntest(")
