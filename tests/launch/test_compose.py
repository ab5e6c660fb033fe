"""From words to settings: short forms, any text in a prompt, presets, and mistakes in one sentence."""

import pytest
from crosslace.conf import VERBS
from crosslace.conf.describe import presets
from crosslace.data.errors import SettingsError
from crosslace.launch.settings.compose import compose_config, fits, tidy
from hypothesis import given
from hypothesis import strategies as st

NEEDED = {
    "store": ["path=s"],
    "train": ["run=r"],
    "eval": ["run=r"],
    "features": ["run=r"],
    "trace": ["run=r", "prompt=p"],
    "steer": ["run=r", "prompt=p"],
    "export": ["run=r", "out=o"],
    "import": ["path=p", "run=r"],
    "sweep": ["run=r"],
    "report": ["run=r"],
    "seeds": ["run=r", "slug=s"],
    "publish": ["run=r", "out=o", "license=mit"],
    "compare": ["run=r", "first=a", "second=b"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_composes(verb: str) -> None:
    compose_config(verb, NEEDED.get(verb, [])).check()


@pytest.mark.parametrize("preset", presets("experiment"))
@pytest.mark.parametrize("verb", ["cache", "train", "demo"])
def test_every_preset_composes_without_a_download(verb: str, preset: str) -> None:
    config = compose_config(verb, [*NEEDED.get(verb, []), f"experiment={preset}"])
    config.check()
    for section in config.values:
        if isinstance(config.values[section], dict):
            config.section(section)


def test_a_preset_and_what_stands_after_it() -> None:
    config = compose_config("train", ["run=r", "experiment=gpt2_plt", "transcoder.features=512"])
    assert config.values["transcoder"]["reach"] == "1"
    assert config.values["transcoder"]["features"] == 512
    assert config.values["model"]["name"] == "openai-community/gpt2"
    assert {"model", "transcoder", "store.path", "transcoder.features"} <= set(config.given)


def test_short_forms() -> None:
    config = compose_config("cache", ["model=./a/model", "dataset=some/data", "store=stores/x", "tokens=2M"])
    assert config.values["model"]["name"] == "./a/model"
    assert config.values["dataset"]["name"] == "some/data"
    assert config.values["store"] | {"path": "stores/x", "tokens": "2M"} == config.values["store"]
    assert compose_config("train", ["run=r", "transcoder.features=24k"]).values["transcoder"]["features"] == 24_000
    assert compose_config("cache", ["world=tiny"]).values["world"]["size"] == "tiny"


def test_the_seed_reaches_what_draws() -> None:
    values = compose_config("train", ["run=r", "seed=7"]).values
    assert values["trainer"]["seed"] == values["store"]["seed"] == 7


@given(st.text(min_size=1).filter(lambda text: text.strip() and text.isprintable()))
def test_a_prompt_may_hold_anything(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    (word,) = tidy("trace", [f"prompt={text}"])
    if text == "null" or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        return  # these have a meaning of their own
    value = OverridesParser.create().parse_override(word).value()
    assert OmegaConf.create({"prompt": value})["prompt"] == text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trainer.lrr=1"], "trainer.lrr is not a setting; did you mean trainer.lr (it takes a number or null)?"),
        (["trainer.lr=abc"], "trainer.lr=abc is not of the right type; it takes a number or null"),
        (["trainer.steps=1.5"], "trainer.steps=1.5 is not of the right type; it takes a whole number"),
        (["trainer.betas=[0.9,x]"], "trainer.betas.* it takes a list of numbers"),
        (["debug=maybe"], "debug=maybe is not of the right type; it takes true or false"),
        (["transcoder=cltt"], r"transcoder=cltt is not known; did you mean transcoder=clt\? it takes one of clt, plt"),
        (["experiment=nope"], "experiment=nope is not known; it takes one of demo"),
        (["transcoder.activation=gelu"], "transcoder.activation=gelu is not known; it takes one of relu"),
        (["trainer.sparsity=target"], "trainer.sparsity=target steers towards trainer.target_l0"),
        (["trace.max_nodes=5"], "trace.max_nodes is not used by `crosslace train`"),
        (["nonsense.thing=5"], "nonsense.thing is not a setting of `crosslace train`"),
        (["runs/x"], "`runs/x` is not a setting; settings are written name=value"),
        (["~trainer.lr"], "is not a setting"),
        (["trainer.steps=1,2"], "trainer.steps takes one value here; several are for `crosslace sweep`"),
        (["transcoder.bandwidth=0.001", "transcoder.activation=jumprelu"], "belongs to activations of unit norm"),
        (["wandb=off"], "wandb=off is not possible; set wandb.mode"),
        (["trainer.lr=[1"], "could not read the settings"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_setting(words: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence.replace("(", r"\(").replace(")", r"\)")) as caught:
        compose_config("train", ["run=r", *words]).check()
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SettingsError, match="run is missing; it takes a folder"):
        compose_config("train", []).check()


def test_a_runs_own_settings_are_the_base() -> None:
    config = compose_config("trace", ["run=r", "prompt=p", "model.device=cpu"])
    config.base_on({"model": {"name": "gpt2", "device": "cuda"}, "trainer": {"steps": 3}, "odd": 1})
    assert config.values["model"]["name"] == "gpt2"
    assert config.values["model"]["device"] == "cpu"
    chosen = compose_config("trace", ["run=r", "prompt=p", "model=stdlib"])
    chosen.base_on({"model": {"name": "gpt2"}})
    assert chosen.values["model"]["name"] == "stdlib"


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        ("1", float, False),
        (None, int | None, True),
        ([1, 2], list[int], True),
        ([1, "a"], list[int], False),
        ([{"a": 1}], list[dict], True),
        ({}, dict[str, int], True),
    ],
)
def test_types(value: object, hint: object, right: bool) -> None:
    assert fits(value, hint) is right
