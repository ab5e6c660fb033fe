"""Freed memory stays with the process where that can be had, and nothing happens where it cannot."""

import platform
import subprocess
import sys

import pytest
from crosslace.data.pages import keep_pages

FAULTS = """
import resource, sys, torch
from crosslace.data.pages import keep_pages
if sys.argv[1:]:
    assert keep_pages()
x = torch.ones(12_000_000)  # 48 MB: above the largest block that glibc keeps by itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    y = x + 1
    del y
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator that is told")
def test_blocks_are_taken_again_without_fresh_pages():
    count = lambda *more: int(subprocess.check_output([sys.executable, "-c", FAULTS, *more]))
    # The system merges and splits pages at its own times, so the best of three runs is taken.
    assert min(count("keep") for _ in range(3)) < count() / 2


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_pages() is False
