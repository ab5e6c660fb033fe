"""The C++ kernels build by themselves, and nothing breaks where they cannot."""

import shutil

import pytest
import torch
from crosslace.train.sparse import cpu as native
from crosslace.train.sparse.products import backend


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache and no memory of an earlier build."""
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path))
    monkeypatch.delenv("CROSSLACE_KERNELS", raising=False)
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_builds_once_into_the_cache(fresh):
    assert native.load() is not None and backend(torch.zeros(1)) == "native"
    (built,) = fresh.glob("native/*.so")
    written = built.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load() is not None and built.stat().st_mtime_ns == written
    assert len(list(fresh.glob("native/*"))) == 1


def test_without_a_compiler_plain_operations_take_over(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    assert native.load() is None and backend(torch.zeros(1)) == "torch"


def test_a_compiler_that_fails_is_reported_and_passed_over(fresh, monkeypatch, caplog):
    broken = fresh / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert native.load() is None and backend(torch.zeros(1)) == "torch"
    assert "plain PyTorch" in caplog.text


def test_other_types_and_devices_are_not_its_business():
    assert not native.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert not native.usable(torch.zeros(1, device="meta"))
