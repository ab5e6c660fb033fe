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
for step in range(40):
    if step == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x + 1
    del y
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator that is told")
def test_blocks_are_taken_again_without_fresh_pages():
    """At first small blocks may settle in the room that a large one left, so that the next large one finds it too short
    and takes fresh pages: in some processes once, in others four times. After that none are fresh."""
    count = lambda *more: int(subprocess.check_output([sys.executable, "-c", FAULTS, *more]))
    assert count("keep") < count() / 20


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_pages() is False
