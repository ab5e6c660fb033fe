"""Features paired over trainings, and the edges and paths that are found again."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from crosslace.circuit.across import held, match_features
from crosslace.circuit.across.matching import assign
from crosslace.circuit.model import ReplacementModel
from crosslace.train.transcoder import Transcoder


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (3, 6), (5, 5), (4, 7)])
def test_the_assignment_is_the_best_of_all(shape: tuple[int, int]) -> None:
    for seed in range(20):
        score = np.random.default_rng(seed).normal(size=shape)
        best = max(
            sum(score[r, c] for r, c in enumerate(columns))
            for columns in itertools.permutations(range(shape[1]), shape[0])
        )
        found = assign(score)
        assert len(set(found)) == shape[0]
        assert sum(score[r, c] for r, c in enumerate(found)) == pytest.approx(best)
    assert assign(np.zeros((0, 4))) == []


@torch.no_grad()
def shuffled(transcoder: Transcoder, seed: int) -> tuple[Transcoder, list[torch.Tensor]]:
    """The same features in another order, and where each went."""
    other = Transcoder(transcoder.settings, transcoder.d_model, transcoder.layers, seed=0, meta=transcoder.meta).to(
        transcoder.dtype
    )
    generator = torch.Generator().manual_seed(seed)
    went = []
    for l, n in enumerate(transcoder.features):
        order = torch.randperm(n, generator=generator)
        other.W_enc[l].copy_(transcoder.W_enc[l][order])
        other.b_enc[l].copy_(transcoder.b_enc[l][order])
        other.W_dec[l].copy_(transcoder.W_dec[l][order])
        other.b_dec[l].copy_(transcoder.b_dec[l])
        if len(transcoder.log_theta):
            other.log_theta[l].copy_(transcoder.log_theta[l][order])
        went.append(order.argsort())
    return other, went


@pytest.mark.parametrize("reach", ["1", "all"])
def test_the_same_dictionary_in_another_order_is_found_whole(make_replacement, prompt, reach: str) -> None:
    rm = make_replacement("llama", reach=reach)
    other, went = shuffled(rm.transcoder, 1)
    rm_other = ReplacementModel(rm.lm, other)
    own, theirs = (model.trace(prompt).prune(node=0.9, edge=0.98) for model in (rm, rm_other))
    features = {(node.layer, node.index) for node in own.nodes if node.kind == "feature"}
    text = [torch.tensor(prompt), torch.tensor(prompt[::-1])]
    (matches,) = match_features(rm.lm, rm.transcoder, [other], features, text)
    for (layer, index), match in matches.items():
        assert match.index == int(went[rm.transcoder.layers.index(layer)][index])
        assert match.likeness == pytest.approx(1, abs=1e-5)
    assert set(matches) == features
    paths = own.top_paths(None, own.logits[0].id, 3, direct=False)
    found = held(own, [(theirs, matches)], paths)
    assert found.trainings == 2 and found.share_of_edges == 1.0 and set(found.features.values()) == {2}
    assert paths and all(count == 2 for _, _, count in found.paths)
    # An edge of the other sign is another edge, and so is one whose end has no counterpart.
    turned = replace(theirs, stored=replace(theirs.stored, values=-theirs.values))
    assert held(own, [(turned, matches)], paths).share_of_edges == 0.0
    some = {key: match for key, match in matches.items() if key[0] == 0}
    fewer = held(own, [(theirs, some)], paths)
    assert 0 < fewer.share_of_edges < 1
    assert fewer.features == {place: 1 + (place[1] == 0) for place in found.features}


def test_another_dictionary_is_no_counterpart(make_replacement) -> None:
    rm = make_replacement("llama", reach="1")
    other = make_replacement("llama", reach="1", seed=99).transcoder
    generator = torch.Generator().manual_seed(0)
    text = [torch.randint(0, 29, (64,), generator=generator) for _ in range(4)]
    (matches,) = match_features(rm.lm, rm.transcoder, [other], [(0, 0), (1, 1)], text)
    assert all(match.likeness < 0.6 for match in matches.values())
    (same,) = match_features(rm.lm, rm.transcoder, [rm.transcoder], [(0, 0), (1, 1)], text)
    assert all(match.likeness > 0.99 and match.index == key[1] for key, match in same.items())
