"""Every family of models keeps the same promises: sites, linear parts, frozen attention, nothing left behind."""

import shutil
from dataclasses import replace

import pytest
import torch
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.models.families import find_family
from crosslace.data.models.language_model import LanguageModel, ModelSettings, load_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast
from transformers.utils import logging

B, T = 2, 9
# norms of some families compute in float32 whatever the dtype
CLOSE = 1e-6


@pytest.fixture
def tokens(tiny):
    return torch.randint(0, tiny.d_vocab, (B, T), generator=torch.Generator().manual_seed(1))


def hooks_left(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def traces_left(lm: LanguageModel) -> list:
    entries = [*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping]
    return [hooks_left(lm), lm.config._attn_implementation, *(entry for entry in entries if "crosslace" in entry)]


def layer_ends(lm: LanguageModel, tokens: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each layer's input and output, by hooks of our own."""
    inputs, outputs, handles = [], [], []
    for parts in lm.layers:
        handles.append(parts.layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])))
        handles.append(
            parts.layer.register_forward_hook(
                lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            )
        )
    lm(tokens)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def test_residual_plus_mlp_out_is_the_next_layers_input(tiny, tokens):
    with tiny.capture(("resid", "mlp_in", "mlp_out")) as sites, tiny.freeze_attention() as patterns:
        inputs, outputs = layer_ends(tiny, tokens)
    torch.testing.assert_close(inputs[0], tiny.embed(tokens) + (p if (p := tiny.position_embed(T)) is not None else 0))
    for layer, parts in enumerate(tiny.layers):
        resid, mlp_in, mlp_out = (sites.__dict__[site][layer] for site in ("resid", "mlp_in", "mlp_out"))
        attn_in = inputs[layer] if parts.attn_norm is None else parts.attn_norm.module(inputs[layer])
        attn_out = parts.attention_output(patterns[layer], attn_in)
        if parts.post_attn_norm is not None:
            attn_out = parts.post_attn_norm.module(attn_out)
        if parts.parallel:  # the MLP reads the layer's input
            torch.testing.assert_close(resid, inputs[layer], atol=CLOSE, rtol=CLOSE)
            torch.testing.assert_close(resid + attn_out + mlp_out, outputs[layer], atol=CLOSE, rtol=CLOSE)
        else:
            torch.testing.assert_close(resid, inputs[layer] + attn_out, atol=CLOSE, rtol=CLOSE)
            torch.testing.assert_close(resid + mlp_out, outputs[layer], atol=CLOSE, rtol=CLOSE)
        expected = resid if parts.mlp_norm is None else parts.mlp_norm.module(resid)
        torch.testing.assert_close(mlp_in, expected, atol=CLOSE, rtol=CLOSE)
        if layer + 1 < tiny.n_layers:
            torch.testing.assert_close(inputs[layer + 1], outputs[layer], rtol=0, atol=0)


def test_norms_and_unembedding_reproduce_the_modules(tiny, tokens):
    x = torch.randn(B, T, tiny.d_model, dtype=tiny.dtype, generator=torch.Generator().manual_seed(2))
    for norm in tiny.norms.values():
        torch.testing.assert_close(norm.frozen(x, norm.denominator(x)), norm.module(x), atol=CLOSE, rtol=CLOSE)
    with tiny.capture(("resid",)) as sites:
        logits = tiny(tokens)
        _, outputs = layer_ends(tiny, tokens)
    final = tiny.final_norm.frozen(outputs[-1], tiny.final_norm.denominator(outputs[-1]))
    linear = nn.functional.linear(final, tiny.W_U, tiny.b_U)
    torch.testing.assert_close(tiny.before_softcap(logits), linear, atol=CLOSE, rtol=CLOSE)
    assert sites.stacked("resid").shape == (B, T, tiny.n_layers, tiny.d_model)


def test_a_logit_at_the_soft_cap_has_a_finite_origin(make_tiny):
    tiny = make_tiny("gemma2")
    for dtype in (torch.float32, torch.bfloat16):
        assert tiny.before_softcap(torch.tensor([-2.0, 0.0, 2.0], dtype=dtype)).isfinite().all()


def test_the_last_linear_map_of_an_mlp_reads_its_neurons(tiny, tokens):
    for parts in tiny.layers:
        if parts.mlp_down is None:
            assert tiny.family in ("mixtral", "qwen3_moe", "gpt_oss")
            continue
        x = torch.randn(1, 3, tiny.d_model, dtype=tiny.dtype)
        seen = []
        with parts.mlp_down.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out)):
            torch.testing.assert_close(parts.mlp(x), seen[0])


def test_overwriting_with_itself_changes_nothing(tiny, tokens):
    clean, before = tiny(tokens), traces_left(tiny)
    with tiny.overwrite(lambda layer, sites: sites["mlp_out"].clone()):
        torch.testing.assert_close(tiny(tokens), clean, rtol=0, atol=0)
    with tiny.overwrite(lambda layer, sites: None):
        torch.testing.assert_close(tiny(tokens), clean, rtol=0, atol=0)
    assert traces_left(tiny) == before


def test_what_is_overwritten_is_what_later_layers_see(tiny, tokens):
    new = torch.randn(B, T, tiny.d_model, dtype=tiny.dtype, generator=torch.Generator().manual_seed(3))
    with (
        tiny.overwrite(lambda layer, sites: new, layers=[0]),
        tiny.capture(("resid", "mlp_out")) as sites,
    ):
        inputs, _ = layer_ends(tiny, tokens)
    torch.testing.assert_close(sites.mlp_out[0], new)
    if not tiny.layers[0].parallel:
        torch.testing.assert_close(inputs[1], sites.resid[0] + new)
    assert hooks_left(tiny) == 0


def test_frozen_attention_and_norms_keep_the_logits(tiny, tokens):
    clean = tiny(tokens)
    with tiny.freeze_attention() as patterns, tiny.freeze_norms() as denominators:
        recorded = tiny(tokens)
    torch.testing.assert_close(recorded, clean, atol=1e-5, rtol=1e-5)
    assert set(patterns) == set(range(tiny.n_layers)) and set(denominators) == set(tiny.norms)
    with tiny.freeze_attention(dict(patterns)), tiny.freeze_norms(dict(denominators)):
        torch.testing.assert_close(tiny(tokens), recorded, atol=1e-10, rtol=1e-10)


def test_frozen_model_is_affine_in_what_is_added(tiny, tokens):
    """With attention, norms and MLP outputs fixed, twice the push moves the logits exactly twice as far."""
    with tiny.freeze_attention() as patterns, tiny.freeze_norms() as denominators, tiny.capture() as sites:
        tiny(tokens)
    push = torch.randn(B, T, tiny.d_model, dtype=tiny.dtype, generator=torch.Generator().manual_seed(4))
    fixed = dict(sites.mlp_out)

    def logits(scale: float) -> torch.Tensor:
        with (
            tiny.freeze_attention(dict(patterns)),
            tiny.freeze_norms(dict(denominators)),
            tiny.overwrite(lambda layer, sites: fixed[layer] + (scale * push if layer == 0 else 0)),
        ):
            return tiny.before_softcap(tiny(tokens))

    # a small push stays well inside a soft cap, whose inverse loses digits near its ends
    once, twice, still = logits(1e-2), logits(2e-2), logits(0.0)
    assert (once - still).abs().max() > 1e-4
    torch.testing.assert_close(twice - still, 2 * (once - still), atol=1e-8, rtol=1e-8)


def test_live_layers_pass_gradients_through_their_pattern(make_tiny):
    lm = make_tiny("llama")
    tokens = torch.arange(4)[None]

    def gradient(**frozen) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def start(layer, sites):
            if layer == 0:
                found.append(sites["mlp_out"].detach().requires_grad_())
                return found[0]
            return sites["mlp_out"].detach()

        with lm.overwrite(start), lm.freeze_attention(**frozen):
            lm(tokens).square().sum().backward()
        assert found[0].grad is not None
        return found[0].grad

    assert not torch.allclose(gradient(), gradient(layers=[]))
    torch.testing.assert_close(gradient(), gradient(layers=range(lm.n_layers)))


@pytest.mark.parametrize("where", ["freeze_attention", "freeze_norms", "overwrite", "capture"])
def test_errors_leave_nothing_behind(make_tiny, where):
    lm = make_tiny("gemma2")
    before = traces_left(lm)

    def fail(layer, sites):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        if where == "overwrite":
            with lm.overwrite(fail):
                lm(torch.zeros(1, 3, dtype=torch.long))
        else:
            with getattr(lm, where)():
                raise RuntimeError("on purpose")
    assert traces_left(lm) == before


def test_cached_steps_equal_one_pass(tiny, tokens):
    cache = tiny.new_cache()
    first, second = tiny(tokens[:, :6], cache=cache), tiny(tokens[:, 6:], cache=cache)
    torch.testing.assert_close(torch.cat([first, second], 1), tiny(tokens), atol=1e-5, rtol=1e-5)


def test_padding_changes_no_real_position(make_tiny):
    lm = make_tiny("qwen3")
    tokens = torch.randint(0, lm.d_vocab, (1, T))
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.ones_like(padded)
    mask[:, T:] = 0
    torch.testing.assert_close(lm(padded, attention_mask=mask)[:, :T], lm(tokens), atol=1e-6, rtol=1e-6)


def test_weight_fingerprint(tiny_models):
    make = tiny_models.make_tiny
    first = make("llama", torch.float64)
    assert first.fingerprint == make("llama", torch.float32).fingerprint
    assert first.fingerprint == make("llama", torch.bfloat16).fingerprint
    assert first.fingerprint != make("llama", torch.float64, seed=1).fingerprint
    assert first.fingerprint != make("llama", torch.float64, intermediate_size=25).fingerprint


# -- loading ---------------------------------------------------------------------------------------------------------


def word_tokenizer(bos: str | None) -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", *"abcdefgh", "<unk>"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, unk_token="<unk>")


@pytest.fixture(scope="module")
def model_folder(tiny_models, tmp_path_factory):
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.make_tiny("llama", torch.float32).model.save_pretrained(folder)
    word_tokenizer("<s>").save_pretrained(folder)
    return folder


def test_load_from_a_folder(model_folder, make_tiny):
    lm = load_model(str(model_folder))
    assert (lm.family, lm.dtype, lm.name) == ("llama", torch.float32, str(model_folder))
    assert lm.fingerprint == make_tiny("llama", torch.float32).fingerprint
    wide = load_model(ModelSettings(str(model_folder), dtype="float64", device="cpu"))
    assert wide.dtype == torch.float64 and wide.fingerprint == lm.fingerprint
    assert lm.tokenize("a b").tolist() == [0, 2, 3]
    assert lm.tokenize("<s> a b").tolist() == [0, 2, 3]
    assert lm.tokenize([5, 0]).tolist() == [5, 0]
    assert [text.strip() for text in lm.token_strings([0, 2, 31])] == ["<s>", "a", "<31>"]


def test_a_tokenizer_without_bos(model_folder):
    lm = LanguageModel(load_model(str(model_folder)).model, word_tokenizer(None))
    assert lm.bos is None and lm.tokenize("a b").tolist() == [2, 3]


def test_a_tokenizer_can_be_given_a_bos(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    word_tokenizer(None).save_pretrained(tmp_path / "model")
    lm = load_model(ModelSettings(str(tmp_path / "model"), bos="c"))
    assert lm.bos == 4 and lm.tokenize("a b").tolist() == [4, 2, 3] and lm.tokenize("c b").tolist() == [4, 3]
    with pytest.raises(UserError, match=r"model\.bos=<bos> is no token of this model; its special tokens are: <unk>"):
        load_model(ModelSettings(str(tmp_path / "model"), bos="<bos>"))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ("a " * 80, "81 tokens.*context holds 64"),
        ([0, 99], "outside 0 to 31"),
        ([-1], "outside 0 to 31"),
    ],
)
def test_bad_prompts(model_folder, prompt, sentence):
    with pytest.raises(UserError, match=sentence):
        load_model(str(model_folder)).tokenize(prompt)


def test_text_needs_a_tokenizer(make_tiny):
    with pytest.raises(UserError, match="no tokenizer"):
        make_tiny("llama").tokenize("a b")


def test_bad_settings_and_places(tmp_path, model_folder):
    with pytest.raises(SettingsError, match=r"model\.dtype=float8 .*float32"):
        ModelSettings(dtype="float8")
    with pytest.raises(UserError, match=r"model\.device=cuda:99 (is not there|needs a GPU)"):
        load_model(ModelSettings(str(model_folder), device="cuda:99"))
    with pytest.raises(UserError, match=r"model\.device=toaster is not known"):
        load_model(replace(ModelSettings(str(model_folder)), device="toaster"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path / "nowhere"))


def test_unknown_family_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"'mamba' are not supported; known are .*llama.*FAMILIES in crosslace/data"):
        find_family("mamba")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="'mamba' are not supported"):
        load_model(str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(model_folder):
    lm = load_model(ModelSettings(str(model_folder), device="cuda"))
    tokens = lm.tokenize("a b c")[None]
    with lm.capture() as sites, lm.freeze_attention() as patterns, lm.freeze_norms() as denominators:
        clean = lm(tokens)
    assert sites.resid[0].is_cuda
    with lm.freeze_attention(dict(patterns)), lm.freeze_norms(dict(denominators)):
        torch.testing.assert_close(lm(tokens), clean, atol=1e-5, rtol=1e-5)
