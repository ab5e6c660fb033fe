"""The worlds that come with the package belong to the facts in the tree, and answer as their records say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from crosslace.data.worlds.world import World, WorldSettings, build_world, pack_world
from crosslace.data.worlds.world.build import world_key
from crosslace.data.worlds.world.shipped import SHIPPED, shipped_world
from crosslace.data.worlds.world.sizes import SIZES
from transformers import AutoModelForCausalLM

NAMES = ("tiny", "small")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def right_answers(folder: Path, split: str = "held_out") -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return World.load(folder).accuracy(lambda tokens: model(input_ids=tokens).logits, split)


@pytest.mark.parametrize("size", NAMES)
def test_a_shipped_world_belongs_to_the_facts_and_is_there_without_training(size: str, empty_cache) -> None:
    settings = WorldSettings(size=size)
    assert shipped_world(world_key(settings)) == SHIPPED / size, "facts or recipe changed: see docs/world.md, Shipped"
    told = []
    folder = build_world(settings, progress=lambda *words, **more: told.append(words))
    assert told == []
    record = World.load(folder).record
    assert right_answers(folder) == record["accuracy"]["held_out"]
    assert min(record["accuracy"]["held_out"].values()) > 0.95


def test_shipped_worlds_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 4e6


def test_other_settings_and_other_facts_are_not_the_shipped_ones(empty_cache, monkeypatch) -> None:
    assert shipped_world(world_key(WorldSettings(size="tiny", seed=1))) is None
    assert shipped_world(world_key(WorldSettings(size="tiny", steps=7))) is None
    changed = replace(SIZES["tiny"], extent=replace(SIZES["tiny"].extent, cities=9))
    monkeypatch.setitem(SIZES, "tiny", changed)
    assert shipped_world(world_key(WorldSettings(size="tiny"))) is None


def test_a_packed_world_is_the_same_model(empty_cache, tmp_path) -> None:
    folder = build_world(WorldSettings(size="tiny"))
    pack_world(folder, tmp_path / "out")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (SHIPPED / "tiny" / name).read_bytes()
    assert "questions" not in json.loads((tmp_path / "out" / "world.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", NAMES)
def test_a_world_that_is_trained_again_answers_as_well(size: str, empty_cache) -> None:
    told = []
    folder = build_world(WorldSettings(size=size), progress=lambda *words, **more: told.append(words), rebuild=True)
    assert told, "nothing was trained"
    again, shipped = right_answers(folder), json.loads((SHIPPED / size / "world.json").read_text())["accuracy"]
    for family, share in shipped["held_out"].items():
        assert again[family] > share - 0.03
