"""Sinks are a second mode: told on made-up norms, and on a model with a sink planted in its weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import zarr
from crosslace.data.errors import SettingsError
from crosslace.data.harvest import HarvestSettings, harvest
from crosslace.data.models.attention_sinks import GAP, SinkRule, check_sinks, described, find_limit
from crosslace.data.models.language_model import LanguageModel
from crosslace.data.store import ActivationStore
from crosslace.data.text import TokenSequence

from ..planted import SINK, RandomText, sandwich_model, with_sinks

ROWS = 400_000


def words(rows: int = ROWS, spread: float = 0.15, seed: int = 0) -> torch.Tensor:
    """Norms of one smooth mode, of median 1."""
    return (torch.randn(rows, generator=torch.Generator().manual_seed(seed)) * spread).exp()


def test_a_smooth_mode_with_a_long_tail_has_no_sinks():
    norms = words(spread=0.55)
    assert norms.max() > 10  # ten medians: where a multiple of the median would mask
    limit = find_limit(norms)
    assert limit is not None and not limit.known and limit.limit == pytest.approx(GAP * float(norms.max()))
    assert not (norms > limit.limit).any()


@pytest.mark.parametrize("members", [1, 17, 2000])
@pytest.mark.parametrize("times", [5, 8, 300])
def test_a_second_mode_is_told_whole_and_alone(times, members):
    norms = torch.cat([words(ROWS - members), times * words(members, 0.05, seed=1)])
    limit = find_limit(norms[torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))])
    assert limit is not None and limit.known
    assert (norms > limit.limit).tolist() == [False] * (ROWS - members) + [True] * members


def test_a_mode_of_more_than_a_hundredth_is_no_second_one():
    norms = torch.cat([words(9800), 8 * words(200)])
    limit = find_limit(norms)
    assert limit is not None and not limit.known


def test_later_text_that_goes_past_the_sample():
    """A second half unlike the first: its sinks are masked where the sample had none, and counted as unforeseen."""
    first, second = words(20_000), torch.cat([1.2 * words(20_000, seed=1), 9 * words(40, 0.05, seed=2)])
    rule = SinkRule(None, "auto").learned({"resid": {3: first}, "mlp_out": {3: first}})
    norms = {"resid": {3: second}, "mlp_out": {3: torch.ones_like(second)}}
    sinks = rule.large(norms)
    assert sinks is not None and sinks.tolist() == [False] * 20_000 + [True] * 40
    assert rule.places(norms, sinks) == {"resid.3": 40, "unforeseen": 40}


def test_a_sample_of_few_rows_and_rows_that_are_all_alike():
    assert find_limit(torch.cat([words(98), torch.tensor([50.0])])) is None  # 99 rows: too few to speak of modes
    alike = find_limit(torch.ones(500))
    assert alike is not None and not alike.known and alike.limit == GAP
    assert find_limit(torch.zeros(500)) is None
    rule = SinkRule(None, "auto").learned({"resid": {0: words(50)}, "mlp_out": {0: words(50)}})
    assert rule.limits == {} and rule.rows == 50 and rule.large({}) is None


def test_the_rules_one_can_choose():
    norms = {"resid": {0: torch.cat([torch.ones(999), torch.tensor([12.0])])}, "mlp_out": {0: torch.ones(1000)}}
    masked = {sinks: SinkRule(7, sinks).learned(norms) for sinks in ("auto", "first", "none", "10", "20")}
    assert {sinks: bool(rule.limits) for sinks, rule in masked.items()} == {
        "auto": True, "first": False, "none": False, "10": True, "20": True,
    }  # fmt: skip
    ten, twenty = masked["10"].large(norms), masked["20"].large(norms)
    assert ten is not None and twenty is not None and ten.sum() == 1 and not twenty.any()
    tokens = torch.tensor([[7, 3, 7]])
    assert [mask.tolist() for mask in masked["auto"].by_token(tokens)] == [
        [[True, False, False]],
        [[False, False, True]],
    ]
    assert not any(mask.any() for mask in masked["none"].by_token(tokens))
    for rule in masked.values():
        assert SinkRule.from_attributes(rule.to_attributes()) == rule
    for wrong, words_ in (
        ("gap", "it takes auto, first, none, or a multiple"),
        ("0.5", "too small"),
        ("nan", "finite"),
    ):
        with pytest.raises(SettingsError, match=words_):
            check_sinks(wrong)


def test_the_old_rule_is_still_read():
    rule = SinkRule.from_attributes(
        {"bos": 3, "multiple": 10.0, "median_norm": {"0": 2.0, "1": 3.0}, "rows": {"sink": 1}}
    )
    norms = {"resid": {0: torch.tensor([19.0, 21.0, 5.0]), 1: torch.tensor([1.0, 1.0, 31.0])}}
    large = rule.large(norms)
    assert rule.sinks == "10.0" and large is not None and large.tolist() == [False, True, True]
    assert SinkRule.from_attributes(rule.to_attributes()) == rule


SETTINGS = HarvestSettings(
    tokens="30000", shuffle_rows=2048, batch_tokens=2048, sample_tokens=4000, block_rows=64, shard_rows=1024
)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_sink_planted_in_a_sandwich_norm_model(family, tmp_path):
    """Told from text to store: which tokens, at which layers; a multiple of ten medians misses it."""
    lm = with_sinks(sandwich_model(family), times=6.0)
    text = RandomText()
    assert harvest(lm, text, replace(SETTINGS, path=str(tmp_path / "s")))
    masked = ActivationStore.open(tmp_path / "s").attributes["masked"]
    planted = sum(int((s.tokens[1:] == SINK).sum()) for s in text.sequences())
    assert 20 < planted == masked["rows"]["sink"] == masked["rows"][f"sink.token.'{SINK}'"]
    assert any(name.startswith("sink.resid.") for name in masked["rows"]) and "sink.unforeseen" not in masked["rows"]
    said = dict(described(masked))
    assert said["sinks: tokens"] == f"'{SINK}' ({planted})" and said["sinks: layers of resid"][0].isdigit()
    assert "note" not in said and described(masked | {"kept": 50 * planted})[-1][1].startswith("more than 1%")
    tokens = torch.cat([batch.token for batch in ActivationStore.open(tmp_path / "s").rows_in_order(4096)])
    assert not (tokens == SINK).any()
    assert harvest(lm, text, replace(SETTINGS, path=str(tmp_path / "old"), sinks="10"))
    assert ActivationStore.open(tmp_path / "old").attributes["masked"]["rows"]["sink"] < planted


def test_harvest_goes_on_where_later_text_has_sinks_that_the_sample_had_not(tmp_path):
    lm: LanguageModel = with_sinks(sandwich_model("gemma2"), times=6.0)
    text = RandomText(sinks_from=300)
    assert harvest(lm, text, replace(SETTINGS, path=str(tmp_path / "s")))
    counts = ActivationStore.open(tmp_path / "s").attributes["masked"]["rows"]
    assert counts["sink"] == counts["sink.unforeseen"] == counts[f"sink.token.'{SINK}'"] > 5


def test_nothing_masked(tmp_path):
    lm = with_sinks(sandwich_model("gemma2"), times=6.0)
    assert harvest(lm, RandomText(), replace(SETTINGS, path=str(tmp_path / "s"), sinks="none"))
    store = ActivationStore.open(tmp_path / "s")
    rows = [(batch.position == 0, batch.token == SINK) for batch in store.rows_in_order(4096)]
    assert all(any(bool(mask.any()) for mask in masks) for masks in zip(*rows))


class TenTimes(RandomText):
    """Four tokens in a thousand are sinks, and from the middle on forty."""

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
        for tokens, document in super().sequences(split, limit_tokens):
            number = int(document[0])
            drawn = torch.rand(len(tokens), generator=torch.Generator().manual_seed(number))
            share = 0.004 if number < self.documents // 2 else 0.04
            yield TokenSequence(torch.where(drawn < share, SINK, tokens), document)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_ten_times_the_sinks_in_the_second_half(tmp_path, dtype):
    """Windows come shorter than was foreseen; every row is handed out once, with what the model computes."""
    lm, text = with_sinks(sandwich_model("gemma2"), times=6.0), TenTimes(share=0.0)
    settings = replace(SETTINGS, path=str(tmp_path / "s"), tokens="17000", dtype=dtype, held_out="0")
    assert harvest(lm, text, settings)
    store = ActivationStore.open(tmp_path / "s")
    group: Any = zarr.open_group(str(tmp_path / "s"), mode="r")
    lengths = group["train/windows"][:, 1].tolist()
    assert lengths[0] == 2048 and any(rows < 2048 for rows in lengths[:-1]), lengths
    assert len(store) == sum(lengths) < 17000 and store.attributes["masked"]["rows"]["sink"] > 250
    batches = [store.batch(0, step, 1000) for step in range(len(store) // 1000 + 1)]
    seen = [pair for batch in batches for pair in zip(batch.document.tolist(), batch.position.tolist())]
    assert len(seen) == len(set(seen)) == len(store)
    assert not any((batch.token == SINK).any() for batch in batches)
    sequences = {int(s.document[0]): s.tokens for s in text.sequences()}
    for row in range(0, 1000, 50):
        document, place = int(batches[-2].document[row]), int(batches[-2].position[row])
        with lm.capture() as captured:
            lm(sequences[document][None])
        expected = torch.stack([captured.resid[layer][0, place] for layer in range(lm.n_layers)])
        allowed = 1e-4 if dtype == "float32" else 2e-2
        torch.testing.assert_close(batches[-2].resid[row], expected, atol=allowed * expected.abs().max(), rtol=allowed)
