"""Interventions against runs made by hand, on every family; then what they refuse, and generation with a cache."""

from contextlib import nullcontext

import pytest
import torch
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement.requests import Intervention, covered_positions
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.models import LanguageModel
from transformers import AttentionInterface

MODES = ["steer", "free", "constrained", "direct"]
SHAPES = [{"reach": "all"}, {"reach": "1", "read": "mlp_in", "skip": True}]
L, P = 1, 3  # the layer and position that most tests change
CLOSE = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture
def active(prompt):
    """`active(rm, layer, position)`: the strongest feature there, and its activation."""

    def find(rm: ReplacementModel, layer: int = L, position: int = P) -> tuple[int, float]:
        value, feature = rm.activations(prompt)[rm.transcoder.layers.index(layer)][position].max(-1)
        assert value > 0
        return int(feature), float(value)

    return find


def clean_run(rm: ReplacementModel, prompt):
    run = rm.clean(rm.lm.tokenize(prompt)[None])
    return run, rm.features(run)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_set_changes_nothing(family, mode, make_replacement, prompt):
    rm = make_replacement(family, reach="all", skip=True)
    result = rm.intervene(prompt, [], mode)
    torch.testing.assert_close(result.logits, result.clean_logits, **CLOSE)
    torch.testing.assert_close(result.clean_logits, rm.lm(rm.lm.tokenize(prompt)[None])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_direct_is_the_local_replacement_model(family, shape, make_replacement, prompt, active):
    """Only what the feature writes moves, through frozen patterns and norms; no other feature does."""
    rm = make_replacement(family, **shape)
    feature, value = active(rm)
    run, acts = clean_run(rm, prompt)
    acts[L][0, P, feature] = 1.01 * value
    result = rm.intervene(prompt, [Intervention(L, P, feature, times=1.01)], "direct")
    torch.testing.assert_close(result.logits, rm.local_logits(run, acts)[0], **CLOSE)
    once = rm.lm.before_softcap(result.logits) - rm.lm.before_softcap(result.clean_logits)
    twice = rm.intervene(prompt, [Intervention(L, P, feature, times=1.02)], "direct")
    twice = rm.lm.before_softcap(twice.logits) - rm.lm.before_softcap(result.clean_logits)
    assert once[P:].abs().max() > 1e-6
    torch.testing.assert_close(twice, 2 * once, atol=1e-8, rtol=1e-7)
    assert once[:P].abs().max() < 1e-12  # nothing flows back


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_constrained_pushes_the_model_itself(family, shape, make_replacement, prompt, active):
    """Frozen up to the feature's layer, live after it: the plain model with what the feature writes added."""
    rm = make_replacement(family, **shape)
    feature, value = active(rm)
    change, vectors = [Intervention(L, P, feature, times=0.0)], -value * rm.transcoder.W_dec[L][feature]
    for layers in (None, range(L + 1), [L]):
        result = rm.intervene(prompt, change, "constrained", layers)
        torch.testing.assert_close(result.logits, pushed(rm, prompt, vectors), **CLOSE)
    inside = rm.intervene(prompt, change, "constrained", past_range=False)
    torch.testing.assert_close(inside.logits, pushed(rm, prompt, vectors[:1]), **CLOSE)


def pushed(rm: ReplacementModel, prompt: list[int], vectors: torch.Tensor, live: bool = True) -> torch.Tensor:
    """Logits of the plain model with vectors [n, D] added at position P to the MLP outputs of layer L and later."""

    def add(layer, sites):
        if not 0 <= layer - L < len(vectors):
            return None
        out = sites["mlp_out"].clone()
        out[:, P] += vectors[layer - L]
        return out

    with rm.lm.freeze_attention() if live else nullcontext(), rm.lm.freeze_norms(), rm.lm.overwrite(add):
        return rm.lm(rm.lm.tokenize(prompt)[None])[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("freeze", [[], ["attention"]], ids=str)
def test_steer_adds_decoder_rows_to_the_models_own_mlps(family, shape, freeze, make_replacement, prompt, active):
    """Held against hooks by hand: the feature's rows times its change on top of live MLPs."""
    rm = make_replacement(family, **shape)
    feature, value = active(rm)
    vectors = -3 * value * rm.transcoder.W_dec[L][feature]
    change = [Intervention(L, P, feature, times=-2.0)]
    result = rm.intervene(prompt, change, freeze=freeze)
    run, _ = clean_run(rm, prompt)
    with rm.lm.freeze_attention(run.patterns if freeze else None):
        expected = pushed(rm, prompt, vectors, live=False)
    torch.testing.assert_close(result.logits, expected, **CLOSE)
    assert (result.logits - result.clean_logits)[P:].abs().max() > 1e-3
    said = str(result.answer)
    assert said.startswith("steer: answered by the model's own MLPs;") and said.endswith(
        freeze[0] if freeze else "nothing"
    )


def test_a_set_feature_of_a_later_layer_counts_from_what_it_is_by_then(make_replacement, prompt, active):
    """Steering: after the first change the second feature is no longer at its clean activation."""
    rm = make_replacement("llama", reach="1")
    first, _ = active(rm, 0)
    second, _ = active(rm, 1)
    before = [Intervention(0, P, first, times=4.0)]
    moved = rm.intervene(prompt, before).activation(1, P, second)
    unmoved = rm.intervene(prompt, [*before, Intervention(1, P, second, value=float(moved))])
    torch.testing.assert_close(unmoved.logits, rm.intervene(prompt, before).logits, **CLOSE)
    assert not torch.isclose(moved, rm.intervene(prompt, []).activation(1, P, second))


def test_who_answers_can_differ_by_layer(make_replacement, prompt, active):
    """Clean up to a layer and the model after it, spelt out, is `constrained`; all clean and frozen is `direct`."""
    rm = make_replacement("gemma2", reach="all", skip=True)
    feature, _ = active(rm)
    change = [Intervention(L, P, feature, times=2.0)]
    spelt = rm.intervene(prompt, change, mlps={range(3): "clean"}, freeze=["attention", "norms"])
    torch.testing.assert_close(spelt.logits, rm.intervene(prompt, change, "direct").logits, **CLOSE)
    mixed = rm.intervene(prompt, change, mlps={0: "clean", range(1, 3): "transcoder"})
    torch.testing.assert_close(mixed.logits, rm.intervene(prompt, change, "free").logits, **CLOSE)  # 0 comes before
    assert "nobody (MLPs as in the clean run) in layers 0 to 0, the transcoder in layers 1 to 2" in str(mixed.answer)
    with pytest.raises(UserError, match="beyond the model's layers 0 to 2"):
        rm.intervene(prompt, change, mlps={3: "clean"})
    with pytest.raises(UserError, match="freeze=heads is not known"):
        rm.intervene(prompt, change, freeze=["heads"])


def test_a_multiple_of_a_silent_feature_is_refused(make_replacement, prompt):
    rm = make_replacement("llama")
    silent = int((rm.activations(prompt)[L][P] == 0).nonzero()[0])
    with pytest.raises(UserError, match=f"feature {silent} of layer 1 is silent at position 3, and 10 times 0 is 0"):
        rm.intervene(prompt, [Intervention(L, P, silent, times=10.0)])
    rm.intervene(prompt, [Intervention(L, P, silent, times=0.0)])  # silencing it asks for what is


def test_constrained_over_all_layers_keeps_every_mlp_output(make_replacement, prompt, active):
    """Only the last norm is live there, which direct freezes too."""
    rm = make_replacement("llama", reach="all")
    feature, _ = active(rm)
    change = [Intervention(L, P, feature, times=3.0)]
    constrained = rm.intervene(prompt, change, "constrained", range(3))
    direct = rm.intervene(prompt, change, "direct")
    for layer in range(3):
        torch.testing.assert_close(constrained.reads[layer], direct.reads[layer], **CLOSE)
    assert not torch.allclose(constrained.logits, direct.logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_free_encodes_anew_and_keeps_the_errors(family, shape, make_replacement, prompt, active):
    rm = make_replacement(family, **shape)
    feature, _ = active(rm)
    run, _ = clean_run(rm, prompt)
    errors, transcoder = rm.errors(run), rm.transcoder
    outputs: dict[int, torch.Tensor] = {}
    for _ in range(rm.lm.n_layers + 1):  # one more layer is right in each pass
        own = {}

        def overwrite(layer, sites, own=own):
            own[layer] = sites["mlp_out"]
            return outputs.get(layer)

        with (
            rm.lm.freeze_attention(),
            rm.lm.freeze_norms(),
            rm.lm.overwrite(overwrite),
            rm.lm.capture(("resid", "mlp_in")) as sites,
        ):
            logits = rm.lm(run.tokens)
        x = sites.stacked(transcoder.settings.read)[0]
        acts = transcoder.encode(x)
        acts[L][P, feature] = 7.5
        y = transcoder.decode(acts, x)
        for layer in range(rm.lm.n_layers):
            outputs[layer] = torch.cat([own[layer][:, :1], (errors[layer] + y[None, :, layer])[:, 1:]], 1)
    result = rm.intervene(prompt, [Intervention(L, P, feature, value=7.5)], "free")
    torch.testing.assert_close(result.logits, logits[0], **CLOSE)
    assert (result.logits - result.clean_logits)[P:].abs().max() > 1e-3
    for layer in range(rm.lm.n_layers):
        expected = acts[layer].clone()
        expected[0] = 0
        torch.testing.assert_close(result.activations(layer), expected, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_many_groups_in_one_pass_equal_each_alone(mode, make_replacement, prompt):
    rm = make_replacement("gemma2", reach="2")
    groups = [
        [Intervention(0, 2, 5, value=3.0)],
        [],
        [Intervention(1, slice(2, None), 1, times=0.0), Intervention(2, -1, 4, value=-2.0)],
        [Intervention(2, slice(None), 3, value=1.5)],
    ]
    for layers in (None, range(3)) if mode == "constrained" else (None,):
        together = rm.intervene_many(prompt, groups, mode, layers)
        in_twos = rm.intervene_many(prompt, groups, mode, layers, batch=2)
        for group, result, split in zip(groups, together, in_twos):
            alone = rm.intervene(prompt, group, mode, layers)
            torch.testing.assert_close(result.logits, alone.logits, **CLOSE)
            torch.testing.assert_close(result.logits, split.logits, **CLOSE)
            assert result.fixed == alone.fixed


def test_values_multiples_and_patches(make_replacement, prompt, active):
    rm = make_replacement("llama")
    feature, value = active(rm)
    other = [*prompt[:4], 11, 12, 13, 14]
    theirs = rm.activations(other)[L][:, feature]

    def logits(position=P, **setting) -> torch.Tensor:
        return rm.intervene(prompt, [Intervention(L, position, feature, **setting)]).logits

    torch.testing.assert_close(logits(times=2.0), logits(value=2 * value))
    torch.testing.assert_close(logits(times=1.0), rm.intervene(prompt, []).clean_logits)
    torch.testing.assert_close(logits(patch_from=prompt), logits(times=1.0))
    torch.testing.assert_close(logits(5, patch_from=other), logits(5, value=theirs[5].item()))
    torch.testing.assert_close(
        logits(patch_from=tuple(other), patch_position=-1), logits(value=theirs[7].item()), **CLOSE
    )
    torch.testing.assert_close(logits(-2, patch_from=other), logits(5, value=theirs[6].item()))  # from its own end
    torch.testing.assert_close(logits(-1, value=4.0), logits(6, value=4.0))
    torch.testing.assert_close(logits("2:4", value=4.0), logits(slice(2, 4), value=4.0))
    torch.testing.assert_close(logits(slice(0, 2), value=4.0), logits(1, value=4.0))  # position 0 has no features


def test_what_a_result_tells(make_replacement, prompt, active):
    rm = make_replacement("qwen2", reach="all")
    feature, value = active(rm)
    result = rm.intervene(prompt, [Intervention(L, P, feature, times=0.5)], "direct")
    clean = rm.activations(prompt)
    later = (clean[2][P] > 0).nonzero()[0, 0].item()
    assert result.activation(L, P, feature).item() == pytest.approx(value / 2)
    assert result.clean_activation(L, P, feature).item() == pytest.approx(value)
    torch.testing.assert_close(result.clean_activations(2), clean[2])
    torch.testing.assert_close(result.activations(2)[P, later], result.activation(2, P, later))
    torch.testing.assert_close(result.activation(2, P - 7, later), result.activation(2, P, later))
    moved = result.effect([(L, P, feature), (2, P, later), (0, P, 0)])
    assert moved[0].item() == pytest.approx(-value / 2) and moved[2] == 0
    # twice the change moves a later pre-activation twice as far
    step = result.preactivation(2, P, later) - result.preactivation(2, P, later, clean=True)
    off = rm.intervene(prompt, [Intervention(L, P, feature, times=0.0)], "direct")
    torch.testing.assert_close(
        off.preactivation(2, P, later) - off.preactivation(2, P, later, clean=True), 2 * step, **CLOSE
    )
    assert result.probabilities().sum().item() == pytest.approx(1)
    assert result.activation(L, 0, feature) == 0 and result.masked.tolist() == [True] + [False] * 6


def test_a_transcoder_of_some_layers(make_replacement, prompt):
    rm = make_replacement("gpt_neox", layers=[0, 2], reach="all")
    for mode in MODES:
        result = rm.intervene(prompt, [Intervention(2, 4, 1, value=2.0), Intervention(0, 4, 1, value=2.0)], mode)
        assert (result.logits - result.clean_logits)[4:].abs().max() > 1e-3
        assert set(result.reads) == {0, 2}


def test_a_model_stored_in_bfloat16_answers_in_float32(family, make_tiny, make_replacement, prompt):
    """Same weights, same effects: nothing is rounded to bfloat16 on the way, and the caller's model stays as it is."""
    stored, transcoder = make_tiny(family, torch.bfloat16), make_replacement(family, torch.float32).transcoder
    rm = ReplacementModel(stored, transcoder)
    assert rm.lm.dtype == torch.float32 and stored.dtype == torch.bfloat16
    exact = make_tiny(family, torch.bfloat16)
    exact = ReplacementModel(LanguageModel(exact.model.double()), transcoder.to(torch.float64))
    for mode in MODES:
        change = [Intervention(L, P, 0, value=8.0)]
        mine, should = rm.intervene(prompt, change, mode), exact.intervene(prompt, change, mode)
        assert mine.logits.dtype == torch.float32 and mine.activation(L, P, 0) == 8
        effect, expected = (one.logits - one.clean_logits for one in (mine, should))
        assert (effect - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1)
    transcoder.to(torch.float32)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"layer": 3, "value": 1}, r"layer 3 has no features; the transcoder covers layers \[0, 1, 2\]"),
        ({"feature": 12, "value": 1}, "features 0 to 11, not 12"),
        ({"position": 7, "value": 1}, "position 7 is outside the prompt's 7 tokens"),
        ({"position": -8, "value": 1}, "position -8 is outside"),
        ({"position": 0, "value": 1}, "position 0 keeps the model's own output"),
        ({"position": slice(None, None, -1), "value": 1}, "goes forward"),
        ({"patch_from": [1, 2]}, "position 3 of patch_from holds no features, it has 2 tokens"),
        ({"patch_from": [1, 2], "patch_position": 0}, "position 0 of patch_from holds no features, it is masked"),
    ],
)
def test_interventions_that_cannot_be_made(make_replacement, prompt, setting, sentence):
    rm = make_replacement("llama")
    with pytest.raises(UserError, match=sentence):
        rm.intervene(prompt, [Intervention(**{"layer": 1, "position": 3, "feature": 0, **setting})])
    assert not any(module._forward_hooks for module in rm.lm.model.modules())


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({}, "nothing to set; give one of value, times and patch_from"),
        ({"value": 1.0, "times": 2.0}, "value and times to set"),
        ({"position": "3 5", "value": 1.0}, "not a position"),
        ({"position": "", "value": 1.0}, "not a position"),
        ({"value": float("nan")}, "value=nan; give a number"),
        ({"times": float("inf")}, "times=inf; give a number"),
    ],
)
def test_interventions_that_say_too_little_or_too_much(setting, sentence):
    with pytest.raises(SettingsError, match=sentence):
        Intervention(**{"layer": 1, "position": 3, "feature": 0, **setting})


def test_modes_and_ranges_that_contradict(make_replacement, prompt):
    rm = make_replacement("llama")
    change = [Intervention(1, 3, 0, value=1.0)]
    with pytest.raises(UserError, match="mode=loose is not known; it takes one of steer, free, constrained, direct"):
        rm.intervene(prompt, change, "loose")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="belongs to mode=constrained"):
        rm.intervene(prompt, change, "direct", range(2))
    with pytest.raises(UserError, match=r"layer 1 is changed but lies outside layers=\[2\]"):
        rm.intervene(prompt, change, "constrained", [2])
    with pytest.raises(UserError, match="beyond the model's layers 0 to 2"):
        rm.intervene(prompt, change, "constrained", range(4))
    with pytest.raises(UserError, match="layer 1 feature 0 is set twice at position 3"):
        rm.intervene(prompt, [*change, Intervention(1, slice(2, 5), 0, times=0.0)])
    for empty in (slice(4, 2), slice(3, 3), slice(-1, -2)):
        with pytest.raises(UserError, match="hold no token of the prompt"):
            rm.intervene(prompt, [Intervention(1, empty, 0, times=0.0)])


def test_an_error_halfway_leaves_nothing_behind(make_replacement, prompt, monkeypatch):
    rm = make_replacement("olmo2")
    before = rm.lm.config._attn_implementation
    monkeypatch.setattr("crosslace.circuit.replacement.carry_out.written_by", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rm.intervene(prompt, [Intervention(0, 3, 0, value=1.0)], "free")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in rm.lm.model.modules())
    assert rm.lm.config._attn_implementation == before
    assert not any("crosslace" in entry for entry in AttentionInterface._global_mapping)


@pytest.mark.parametrize(
    ("position", "prompt_length", "end", "expected"),
    [
        (2, 5, 5, [2]),
        (-1, 5, 8, [4]),
        (6, 5, 8, [6]),
        (slice(3, None), 5, 8, [3, 4, 5, 6, 7]),
        (slice(-2, None), 5, 8, [3, 4, 5, 6, 7]),
        (slice(1, -2), 5, 8, [1, 2]),
        (slice(None, None, 3), 5, 8, [0, 3, 6]),
        (slice(-9, 2), 5, 8, [0, 1]),
        (slice(9, None), 5, 8, []),
    ],
)
def test_positions(position, prompt_length, end, expected):
    covered = covered_positions(Intervention(0, position, 0, value=1.0), prompt_length, end)
    assert list(covered) == expected


# -- generation ------------------------------------------------------------------------------------------------------


def test_generation_without_interventions_is_the_models_own(family, make_replacement, prompt):
    rm = make_replacement(family)
    tokens = rm.lm.tokenize(prompt)
    for _ in range(6):
        new = rm.lm(tokens[None])[0, -1].argmax()
        tokens = torch.cat([tokens, new[None]])
        if new.item() in rm.lm.end_tokens:
            break
    assert rm.generate(prompt, max_new_tokens=6).tokens.tolist() == tokens.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "gpt_neox", "gpt_oss", "phi3"])
def test_generation_goes_on_over_new_tokens(family, mode, make_replacement, prompt):
    """With a cache, step by step, as without one on the grown prompt; sliding windows shorter than the text."""
    rm = make_replacement(family, reach="all")
    changes = [Intervention(1, slice(3, None), 5, value=9.0), Intervention(0, slice(-1, None), 2, times=-1.0)]
    fixed_start = [changes[0], Intervention(0, slice(6, None), 2, times=-1.0)]
    tokens = rm.lm.tokenize(prompt)
    for number in range(5):
        result = rm.intervene(tokens, fixed_start, mode)
        new = result.logits[-1].argmax()
        if number == 0:
            first = result
        tokens = torch.cat([tokens, new[None]])
        if new.item() in rm.lm.end_tokens:
            break
    generated = rm.generate(prompt, changes, 5, mode)
    assert generated.tokens.tolist() == tokens.tolist()
    assert generated.prompt_length == len(prompt)
    assert generated.text == " ".join(map(str, tokens[len(prompt) :].tolist()))
    torch.testing.assert_close(generated.probabilities, first.probabilities(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(generated.clean_probabilities, first.probabilities(clean=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "qwen3"])
def test_generation_of_several_groups_is_that_of_each(family, mode, make_replacement, prompt):
    """Texts that part, one that ends early, groups of different last layers, and fewer in a batch than there are."""
    rm = make_replacement(family, reach="all")
    groups = [
        [],
        [Intervention(1, slice(3, None), 5, value=9.0), Intervention(0, slice(-1, None), 2, times=-1.0)],
        [Intervention(1, slice(3, None), 5, value=-30.0)],
        [Intervention(0, slice(2, None), 3, value=40.0)],
    ]
    rm.lm.model.generation_config.eos_token_id = None
    texts = [rm.generate(prompt, group, 6, mode).tokens.tolist() for group in groups]
    assert len({tuple(text) for text in texts}) > 1
    rm.lm.model.generation_config.eos_token_id = texts[1][len(prompt) + 1]  # the second ends after two tokens
    for batch, temperature in ((32, 0.0), (3, 0.0), (32, 1.5)):
        together = rm.generate_many(prompt, groups, 6, mode, temperature=temperature, batch=batch)
        for group, one in zip(groups, together):
            alone = rm.generate(prompt, group, 6, mode, temperature=temperature)
            assert one.tokens.tolist() == alone.tokens.tolist() and one.text == alone.text
            torch.testing.assert_close(one.probabilities, alone.probabilities, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(one.clean_probabilities, alone.clean_probabilities, atol=1e-6, rtol=1e-5)


def test_sampling_follows_its_seed_and_stops_at_the_context(make_replacement, prompt):
    rm = make_replacement("qwen3")
    rm.lm.model.generation_config.eos_token_id = None
    draws = [rm.generate(prompt, max_new_tokens=8, temperature=2.0, seed=seed).tokens.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(rm.generate([5] * 60, max_new_tokens=20).tokens) == 64
