"""The bundled world: correct facts, composition held out, a tokenizer that hides states, a model that answers."""

import json
import os
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from crosslace.data.cache import cache_root
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.worlds.world import World, WorldSettings, build_world
from crosslace.data.worlds.world.build import make_tokenizer
from crosslace.data.worlds.world.geography import CITIES, RELATIONS, STATES
from crosslace.data.worlds.world.questions import all_questions
from crosslace.data.worlds.world.sizes import SIZES
from crosslace.data.worlds.world.words import LANGUAGES, NAME_WORDS, OPPOSITES
from transformers import AutoModelForCausalLM, AutoTokenizer

DALLAS = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> World:
    """The tiny world, built once for all test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLACE_CACHE", str(request.config.cache.mkdir("crosslace")))
        return World.load(build_world(WorldSettings(size="tiny")))


@pytest.fixture(scope="module")
def model(world: World):
    return AutoModelForCausalLM.from_pretrained(world.folder)


@pytest.fixture(scope="module")
def small():
    """Questions and tokenizer of the small world, without its model."""
    questions = all_questions(SIZES["small"].extent, seed=0)
    return questions, make_tokenizer(SIZES["small"], questions)


def test_there_are_fifty_states_with_capitals_and_cities():
    assert len({state.name for state in STATES}) == len({state.capital for state in STATES}) == 50
    assert len({state.abbreviation for state in STATES}) == len({state.nickname for state in STATES}) == 50
    assert Counter(state.region for state in STATES) == {"South": 16, "West": 13, "Midwest": 12, "Northeast": 9}
    assert len(RELATIONS) >= 5 and set(CITIES) == {state.name for state in STATES}
    assert min(map(len, CITIES.values())) >= 10


@pytest.mark.parametrize(
    ("state", "abbreviation", "capital", "year"),
    [("Texas", "TX", "Austin", "1845"), ("Delaware", "DE", "Dover", "1787"), ("Hawaii", "HI", "Honolulu", "1959")],
)
def test_some_facts(state: str, abbreviation: str, capital: str, year: str):
    found = next(s for s in STATES if s.name == state)
    assert (found.abbreviation, found.capital, found.year) == (abbreviation, capital, year)


def test_a_city_names_one_state():
    names = [name for names in CITIES.values() for name in names]
    assert len(names) == len(set(names))
    assert not set(names) & {state.capital for state in STATES}
    for state, cities in CITIES.items():
        for city in cities:
            assert not any(other.name in city for other in STATES), (state, city)


def test_no_word_of_the_opposites_occurs_twice():
    words = Counter(word for pair in OPPOSITES for side in pair for word in side)
    assert len(OPPOSITES) >= 40 and all(len(side) == len(LANGUAGES) for pair in OPPOSITES for side in pair)
    assert [word for word, count in words.items() if count > 1] == []
    assert all(len({word[0] for word in words}) > 20 for words in NAME_WORDS)


def test_no_token_of_a_city_tells_its_state(small):
    _, tokenizer = small
    owners = defaultdict(set)
    for state, cities in CITIES.items():
        for city in cities:
            tokens = tokenizer.tokenize(city)
            assert 2 <= len(tokens) <= 7, (city, tokens)
            for token in tokens:
                owners[token].add(state)
    assert {token: states for token, states in owners.items() if len(states) < 2} == {}


def test_answers_can_be_told_by_their_first_token(small):
    questions, tokenizer = small
    capitals = {state.capital: tokenizer.tokenize(state.capital)[0] for state in STATES}
    assert len(set(capitals.values())) == 50
    assert all(capital.split()[0] == first.strip("▁") for capital, first in capitals.items())
    assert all(len(tokenizer.tokenize(word)) == 1 for pair in OPPOSITES for side in pair for word in side)
    assert tokenizer.tokenize("NWS") == ["▁N", "W", "S"]
    assert not any(tokenizer.unk_token in tokenizer.tokenize(q.text) for q in questions)
    text = "the nickname of the state containing Dallas is Lone Star State"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_held_out_combinations_need_composing(small):
    questions, _ = small
    train = [q for q in questions if not q.held_out]
    held_out = [q for q in questions if q.held_out]
    assert not {q.text for q in train} & {q.text for q in held_out}
    assert not {q.prompt for q in train} & {q.prompt for q in held_out}
    seen = {q.text for q in train}
    for q in (q for q in held_out if q.family == "two_hop"):
        city, state, relation = (q.facts[key] for key in ("city", "state", "relation"))
        assert f"the state containing {city} is {state}" in seen
        assert f"the {relation} of {state} is {q.answer}" in seen
    counts = Counter(q.family for q in held_out)
    assert counts["two_hop"] > 1000 and counts["opposites"] > 40 and counts["acronyms"] > 500
    assert next(q for q in questions if q.prompt == DALLAS).held_out


def test_the_large_world_adds(small):
    questions = all_questions(SIZES["large"].extent, seed=0)
    sums = [q for q in questions if q.family == "addition"]
    assert len(sums) == 8100 and all(int(q.facts["first"]) + int(q.facts["second"]) == int(q.answer) for q in sums)
    tokenizer = make_tokenizer(SIZES["large"], questions)
    assert tokenizer.tokenize("the sum of 36 and 59 is 95")[-2:] == ["▁9", "5"]
    assert not [q for q in small[0] if q.family == "addition"]


def test_questions_follow_from_the_seed():
    extent = replace(SIZES["tiny"].extent, names=50)
    assert all_questions(extent, 3) == all_questions(extent, 3)
    assert all_questions(extent, 3) != all_questions(extent, 4)


def test_dallas_is_in_texas_whose_capital_is_austin(world: World, model):
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    tokens = tokenizer(DALLAS, return_tensors="pt")["input_ids"]
    assert tokens[0, 0] == tokenizer.bos_token_id and tokens.shape[1] > len(DALLAS.split()) + 1
    assert tokenizer.decode(model(tokens).logits[0, -1].argmax()).strip() == "Austin"


def test_the_record_tells_the_truth(world: World, model):
    accuracy = world.accuracy(lambda tokens: model(tokens).logits)
    assert accuracy == pytest.approx(world.record["accuracy"]["held_out"])
    assert accuracy["two_hop"] >= 0.8
    record = json.loads((world.folder / "world.json").read_text(encoding="utf-8"))
    assert record["seconds"]["total"] > 0 and record["settings"]["size"] == "tiny"
    assert record["splits"]["held_out"]["two_hop"] == len(world.questions("two_hop"))


def test_labels_say_where_the_state_is_known(world: World):
    question = world.question(DALLAS)
    assert question is not None and question.facts["state"] == "Texas"
    labels = world.labels(question)
    tokens = world.tokens(question)
    assert len(labels) == len(tokens)
    known = [i for i, concepts in enumerate(labels) if "state: Texas" in concepts]
    assert known == [len(tokens) - 2, len(tokens) - 1]  # the last piece of Dallas, and `is`
    assert labels[0] == () and "answer: Austin" in labels[-1]
    for q in world.all_questions:
        assert world.labels(q)[-1]


def test_corpus_is_a_dataset(world: World):
    corpus = world.corpus(seed=1)
    assert set(corpus) == {"train", "held_out"} and set(corpus["train"].column_names) == {"text", "family"}
    assert f"{DALLAS} Austin" in corpus["held_out"]["text"]
    assert corpus["train"]["text"][:] == world.corpus(seed=1)["train"]["text"][:]
    assert corpus["train"]["text"][:] != world.corpus(seed=2)["train"]["text"][:]


def test_an_unknown_family_split_or_size_is_refused(world: World):
    with pytest.raises(SettingsError, match="two_hop, opposites, acronyms"):
        world.questions("three_hop")
    with pytest.raises(SettingsError, match="train, held_out"):
        world.questions("two_hop", split="test")
    with pytest.raises(SettingsError, match=r"world\.size=huge .* tiny, small, large"):
        WorldSettings(size="huge")
    with pytest.raises(UserError, match=r"is not a world"):
        World.load("/")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_one_seed_gives_one_model(empty_cache, tmp_path, monkeypatch):
    weights = []
    for name in ("a", "b"):
        monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path / name))
        folder = build_world(WorldSettings(size="tiny", steps=2))
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert build_world(WorldSettings(size="tiny", steps=2, seed=1)) != folder


def test_an_interrupted_build_leaves_nothing(empty_cache):
    def interrupt(label: str, done: float, total: float | None = None, note: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_world(WorldSettings(size="tiny", steps=1), progress=interrupt)
    assert [path for path in empty_cache.iterdir() if path.is_dir()] == []
    folder = build_world(WorldSettings(size="tiny", steps=1))
    assert [path for path in empty_cache.iterdir() if path.is_dir()] == [folder]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="CROSSLACE_CACHE"):
        build_world(WorldSettings(size="tiny", steps=1))


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("CROSSLACE_CACHE", "/somewhere")
    assert str(cache_root()) == "/somewhere"
    monkeypatch.delenv("CROSSLACE_CACHE")
    assert cache_root() == type(cache_root())(os.path.expanduser("~/.cache/crosslace"))


def test_training_leaves_the_callers_random_numbers_alone(empty_cache):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_world(WorldSettings(size="tiny", steps=1))
    assert torch.equal(torch.rand(3), expected)
