"""The Triton kernels against dense products, in a process of their own (see kernel_checks.py)."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).with_name("kernel_checks.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_on_the_device_or_interpreted():
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CHECKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2], timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
