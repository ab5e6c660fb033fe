"""Influence, thresholds and moves to errors on random DAGs, against the definitions."""

import pytest
import torch
from crosslace.circuit.graph import rows as graph_rows
from crosslace.circuit.graph.influence import cumulative_share, fewest_edges, fewest_nodes, find_influence
from crosslace.circuit.graph.rows import DenseRows, move_to_errors
from hypothesis import given, settings
from hypothesis import strategies as st

FEATURES, INPUTS, LOGITS = 9, 5, 2


def random_dag(seed, zero_share=0.3):
    """Rows over 3 layers of 3 features, 5 inputs and 2 logits."""
    random = torch.Generator().manual_seed(seed)
    N = FEATURES + INPUTS + LOGITS
    rows = torch.randn(FEATURES + LOGITS, N, generator=random, dtype=torch.float64)
    rows[torch.rand(rows.shape, generator=random) < zero_share] = 0
    depth = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 9, 9])
    column_depth = torch.cat([depth[:FEATURES], torch.full((INPUTS,), -1), torch.full((LOGITS,), 10)])
    rows[column_depth[None] >= depth[:, None]] = 0
    targets = torch.cat([torch.arange(FEATURES), torch.arange(N - LOGITS, N)])
    weights = torch.zeros(N, dtype=torch.float64)
    weights[-LOGITS:] = torch.tensor([0.7, 0.2])
    return rows, targets, depth, weights, torch.rand(len(rows), generator=random, dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([3, 40, 2**22]))
def test_influence_is_the_sum_over_all_paths(seed, chunk):
    rows, targets, depth, weights, left_out = random_dag(seed)
    before, graph_rows.CHUNK = graph_rows.CHUNK, chunk
    try:
        found = find_influence(DenseRows(rows), targets, depth, weights, left_out)
    finally:
        graph_rows.CHUNK = before
    hat = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    total = rows.abs().sum(1, keepdim=True) + left_out[:, None]
    hat[targets] = rows.abs() / total
    eye = torch.eye(len(weights), dtype=torch.float64)
    expected = weights @ (torch.linalg.inv(eye - hat) - eye)
    torch.testing.assert_close(found.nodes, expected)
    torch.testing.assert_close(found.per_input, ((expected + weights)[targets] / total.squeeze(1)))
    # what flows out of the logits arrives at inputs or was left out
    arrived = found.nodes[FEATURES : FEATURES + INPUTS].sum() + found.cancelled
    empty = (total == 0).any()
    assert bool(empty) or float(arrived) == pytest.approx(float(weights.sum()))


def test_order_of_rows_does_not_matter():
    rows, targets, depth, weights, left_out = random_dag(1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    first = find_influence(DenseRows(rows), targets, depth, weights, left_out)
    second = find_influence(DenseRows(rows[order]), targets[order], depth[order], weights, left_out[order])
    torch.testing.assert_close(first.nodes, second.nodes)
    torch.testing.assert_close(first.per_input[order], second.per_input)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 0.999, 1.0])
def test_fewest_nodes(share):
    values = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    kept = fewest_nodes(values, share)
    reached = float(values[kept].sum())
    assert reached >= share * float(values.sum()) - 1e-6
    if int(kept.sum()) > 1:
        assert reached - float(values[kept].min()) < share * float(values.sum())
    assert not kept[2]
    assert not fewest_nodes(torch.zeros(3), 0.8).any()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_fewest_edges_is_what_a_full_sort_keeps(seed, share):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(13, 17, generator=random) ** 3
    rows[torch.rand(rows.shape, generator=random) < 0.3] = 0
    weight = torch.rand(13, generator=random)
    kept = fewest_edges(rows, weight, share)
    scores = (rows.abs() * weight[:, None]).flatten()
    ordered = scores.sort(descending=True).values.double()
    count = int((ordered.cumsum(0) < share * ordered.sum()).sum()) + 1
    assert abs(int(kept.sum()) - min(count, int((scores > 0).sum()))) <= 1
    assert scores[kept.flatten()].min() >= scores[~kept.flatten()].max()


def test_no_edges_are_kept_where_there_is_no_flow():
    assert not fewest_edges(torch.ones(2, 3), torch.zeros(2), 0.9).any()


def test_moving_to_errors_keeps_sums_and_books_what_cancels():
    rows = torch.tensor([[1.0, -2.0, 3.0, 0.5, 0.0]])
    left_out = torch.zeros(1)
    total = rows.sum()
    moved = rows[:, :3].clone()
    rows[:, :3] = 0
    move_to_errors(rows, left_out, moved, torch.tensor([3, 3, 4]))
    torch.testing.assert_close(rows, torch.tensor([[0, 0, 0, -0.5, 3.0]]))
    torch.testing.assert_close(rows.sum(), total)
    # |1| + |-2| + |0.5| went into one error whose size is 0.5
    torch.testing.assert_close(left_out, torch.tensor([3.0]))


def test_cumulative_share_is_small_for_the_important():
    share = cumulative_share(torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(share, torch.tensor([1.0, 0.75, 1.0]))
