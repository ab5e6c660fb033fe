"""Apple's MPS has no float64: what runs on the device keeps to float32, seen on a stand-in for such a device."""

import sys
from dataclasses import replace

import pytest
import torch
from crosslace.circuit.graph import DenseRows
from crosslace.circuit.model import ReplacementModel
from crosslace.data.device import widest
from crosslace.train.run.metrics import worst_rows
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

PROMPT = [3, 0, 17, 9, 9, 28, 4]


class OnDevice(torch.Tensor):
    """A tensor of the stand-in device."""


class WithoutFloat64(TorchFunctionMode):
    """What is computed from a tensor of the device is one, and may not be float64; `.cpu()` leaves the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not any(isinstance(x, OnDevice) for x in _pytree.tree_leaves((args, kwargs))):
            return found
        if func is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        for x in _pytree.tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        return found


@pytest.fixture
def there(make_replacement, monkeypatch):
    """A replacement model whose language model is on the stand-in."""
    rm = make_replacement("llama", torch.float32, reach="all", skip=True)
    for module in rm.lm.model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                moved = torch.nn.Parameter(weight.data.as_subclass(OnDevice), requires_grad=False)
                monkeypatch.setitem(module._parameters, name, moved)
    # the stand-in's tensors say that they are on the CPU: these two are what asks
    stand_in = {"widest": lambda device: torch.float32, "wide": lambda x: x.float()}
    for name in [name for name in sys.modules if name.startswith("crosslace.")]:
        for asks, answer in stand_in.items():
            if hasattr(sys.modules[name], asks):
                monkeypatch.setattr(sys.modules[name], asks, answer)
    with WithoutFloat64():
        yield ReplacementModel(rm.lm, rm.transcoder)


def test_the_stand_in_has_no_float64(there):
    assert widest("mps:0") == widest(torch.device("mps")) == torch.float32 and widest("cpu") == torch.float64
    with pytest.raises(TypeError, match="float64"):
        there.clean(torch.tensor([PROMPT])).logits.double()


def test_traces_prunes_and_steers(there):
    graph = there.trace(PROMPT)
    assert there.trace(PROMPT, max_nodes=20).n_features == 20
    graph = replace(graph, stored=DenseRows(graph.values.as_subclass(OnDevice)))  # as rows on a device are
    assert isinstance(graph.influence(), OnDevice)
    assert 0 < graph.prune().scores()["replacement_score"] < 1 and graph.carrying(0.99).n_features
    assert graph.top_paths(None, graph.logits[0].id)
    change = graph.interventions([graph.n_features - 1], times=-1.0)
    for mode in ("steer", "free", "constrained", "direct"):
        assert there.intervene(PROMPT, change, mode).logits.isfinite().all()
    assert len(there.generate(PROMPT, change, 3).tokens)


def test_the_worst_rows_are_found(there):
    error_NL = torch.rand(2000, 3).as_subclass(OnDevice)
    share, rows = worst_rows(error_NL)
    assert share.dtype == torch.float32 and torch.equal(rows[0].as_subclass(torch.Tensor), error_NL.argmax(0))
