"""Whether a cross-layer transcoder skips steps: planted decoders that say what the model's MLPs do, and that do not."""

import pytest
import torch
from crosslace.circuit.judge.evaluation import verdicts
from crosslace.circuit.judge.perturbation import steps_skipped


@pytest.fixture
def planted(make_replacement, prompt):
    """A CLT in which layer 0 alone writes, first to itself only; and the graph of the prompt."""
    rm = make_replacement("llama", reach="all", seed=5)
    with torch.no_grad():
        for l, W in enumerate(rm.transcoder.W_dec):
            W[:, 1:] = 0
            if l > 0:
                W.zero_()
    tokens = torch.tensor(prompt)
    acts = rm.activations(tokens)[0]
    own = acts @ rm.transcoder.W_dec[0][:, 0]
    outs = []
    for size in (0.1, -0.1):
        push = lambda layer, sites, size=size: sites["mlp_out"] + size * own if layer == 0 else None
        with rm.lm.overwrite(push), rm.lm.capture(("mlp_out",)) as found:
            rm.lm(tokens[None])
        outs.append(found.mlp_out[1][0])
    response = (outs[0] - outs[1]) / 0.2  # [T, D]: what layer 1 makes of it
    return rm, acts, response


def with_later_writes(rm, acts, wanted, prompt):
    """Decoders from layer 0 to layer 1 so that the features write `wanted` [T, D] there, as well as they can."""
    with torch.no_grad():
        rm.transcoder.W_dec[0][:, 1] = torch.linalg.pinv(acts) @ wanted
    written = acts @ rm.transcoder.W_dec[0][:, 1]
    return written, steps_skipped(rm, [rm.trace(prompt)], node=1.0)


def test_what_the_model_itself_computes_is_a_skipped_step(planted, prompt) -> None:
    rm, acts, response = planted
    written, found = with_later_writes(rm, acts, response, prompt)
    expected = float((response * written).sum() / written.square().sum())
    assert found["prompts"] == 1 and found["share"] == pytest.approx(expected, rel=1e-4)
    assert found["share"] > 0.9 and abs(found["control"]) < 0.9 and 0 < found["written_later"] < 1


def test_what_it_does_not_is_none(planted, prompt) -> None:
    rm, acts, response = planted
    noise = torch.randn(response.shape, generator=torch.Generator().manual_seed(0), dtype=response.dtype)
    across = (
        noise
        - (noise * response).sum(-1, keepdim=True) / response.square().sum(-1, keepdim=True).clamp_min(1e-12) * response
    )
    _, found = with_later_writes(rm, acts, across, prompt)
    assert abs(found["share"]) < 0.1


def test_without_later_writes_there_is_nothing_to_ask(planted, prompt) -> None:
    rm, _, _ = planted
    found = steps_skipped(rm, [rm.trace(prompt), None], node=1.0)
    assert found["prompts"] == 0 and found["share"] != found["share"]  # not a number


def test_the_verdict_follows_the_interval() -> None:
    said = lambda share, interval, control=0.0: verdicts(
        {"health": {"warnings": []}, "steps": {"share": share, "share_interval": interval, "control": control}}
    )
    assert said(0.5, (0.3, 0.7))[0].startswith("graphs skip steps: 50% (95%: 30% to 70%)")
    assert said(0.5, (0.05, 0.95)) == [] and said(0.5, None) == [] and said(0.5, (0.3, 0.7), control=0.4) == []
