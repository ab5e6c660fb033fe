"""Kernels: found where the package's build left them, compiled once otherwise, and a failure is remembered."""

import logging
from pathlib import Path

import pytest
from crosslace.data import compiler

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "BUILT", tmp_path / "built")
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "some.cpp").write_text(SOURCE)
    return tmp_path / "kernel" / "some.cpp"


needs_compiler = pytest.mark.skipif(compiler.find_compiler() is None, reason="there is no C++ compiler")


@needs_compiler
def test_compiled_once_into_the_cache(source: Path, monkeypatch) -> None:
    library = compiler.compiled(source)
    assert library is not None and library.answer() == 42
    monkeypatch.setattr(compiler, "build", lambda *_: pytest.fail("compiled a second time"))
    assert compiler.compiled(source) is not None


@needs_compiler
def test_what_the_packages_build_left_is_taken(source: Path, tmp_path: Path, monkeypatch) -> None:
    program = compiler.find_compiler()
    assert program is not None
    compiler.build(program, source, [], tmp_path / "built" / compiler.library_name(source, []))
    monkeypatch.setattr(compiler, "find_compiler", lambda: pytest.fail("looked for a compiler"))
    library = compiler.compiled(source)
    assert library is not None and library.answer() == 42 and not (tmp_path / "cache").exists()


def test_a_compiler_that_fails_is_tried_once(source: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    tried = tmp_path / "tried"
    broken = tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\necho x >> {tried}\necho the disk is on fire >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with caplog.at_level(logging.WARNING):
        assert compiler.compiled(source) is None and compiler.compiled(source) is None
    assert tried.read_text().count("x") == 1
    (kept,) = (tmp_path / "cache").rglob("*.failed.txt")
    assert "the disk is on fire" in kept.read_text()
    assert all("more slowly" in line for line in caplog.messages) and str(kept) in caplog.messages[-1]


def test_without_a_compiler_it_is_said_that_work_is_slower(source: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert compiler.compiled(source) is None
    assert len(caplog.messages) == 1 and "no C++ compiler" in caplog.text and "more slowly" in caplog.text
