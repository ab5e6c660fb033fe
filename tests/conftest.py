"""Fixtures that every room's tests may use."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch


@cache
def _tiny_models() -> ModuleType:
    """`tests/tiny_models.py`: with importlib's import mode, tests are no package and cannot import each other."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TINY_FAMILIES = _tiny_models().TINY_FAMILIES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `family` runs once for every tiny model there is, unless it names its own."""
    named = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not named:
        metafunc.parametrize("family", TINY_FAMILIES)


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """The module itself: `make_tiny(family, dtype, seed, **config)`, `TINY_FAMILIES`, `EXACT_FAMILIES`."""
    return _tiny_models()


@pytest.fixture(scope="session")
def make_tiny(tiny_models: ModuleType):
    """`make_tiny(family, dtype=torch.float64, seed=0, **config)`; built once per session for equal arguments."""
    return cache(tiny_models.make_tiny)


@pytest.fixture
def tiny(family: str, make_tiny):
    """A tiny random model of each family in turn, in float64."""
    return make_tiny(family, torch.float64)
