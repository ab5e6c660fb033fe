"""The replacement model: whole, local, masked, loaded; on every family."""

import errno

import pytest
import torch
from crosslace.circuit.features.global_weights import virtual_weights
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement.memory import memory_named
from crosslace.circuit.replacement.requests import Intervention
from crosslace.circuit.replacement.substitute import TranscoderOutput
from crosslace.data.errors import UserError
from crosslace.data.models.attention_sinks import SinkRule
from crosslace.data.models.language_model import LanguageModel, ModelSettings
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder
from tokenizers import Tokenizer, models
from transformers import AttentionInterface, PreTrainedTokenizerFast
from transformers.utils import logging

SHAPES = [
    {"reach": "1"},
    {"reach": "all"},
    {"reach": "2", "skip": True},
    {"reach": "all", "read": "mlp_in", "activation": "relu", "skip": True},
    {"reach": "2", "activation": "topk", "k": 3},
]


def tokens_of(rm: ReplacementModel, prompt: list[int]) -> torch.Tensor:
    return rm.lm.tokenize(prompt)[None]


def by_hand(rm: ReplacementModel, tokens: torch.Tensor, layers: set[int]) -> torch.Tensor:
    """The whole replacement through `Transcoder.forward`, one more layer replaced in each pass."""
    outputs: dict[int, torch.Tensor] = {}
    transcoder = rm.transcoder
    for _ in range(rm.lm.n_layers + 1):
        with rm.lm.overwrite(lambda layer, sites: outputs.get(layer)), rm.lm.capture(("resid", "mlp_in")) as seen:
            logits = rm.lm(tokens)
        x = seen.stacked(transcoder.settings.read)[0][:, transcoder.layers]
        y = transcoder(x)
        own = own_outputs(rm, tokens, outputs)
        for l, layer in enumerate(transcoder.layers):
            if layer in layers:
                outputs[layer] = torch.cat([own[layer][:, :1], y[None, 1:, l]], 1)
    return logits


def own_outputs(rm: ReplacementModel, tokens: torch.Tensor, outputs: dict[int, torch.Tensor]) -> dict:
    found = {}

    def keep(layer, sites):
        found[layer] = sites["mlp_out"]
        return outputs.get(layer)

    with rm.lm.overwrite(keep):
        rm.lm(tokens)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layers", [{0, 1, 2}, {1}, {0, 2}], ids=str)
def test_whole_replacement_equals_the_transcoders_own_forward(make_replacement, prompt, shape, layers):
    rm = make_replacement("llama", **shape)
    tokens = tokens_of(rm, prompt)
    torch.testing.assert_close(rm.replaced_logits(tokens, layers), by_hand(rm, tokens, layers), atol=1e-5, rtol=1e-5)


def test_whole_replacement_of_every_family(family, make_replacement, prompt):
    rm = make_replacement(family)
    tokens = tokens_of(rm, prompt)
    replaced = rm.replaced_logits(tokens)
    torch.testing.assert_close(replaced, by_hand(rm, tokens, {0, 1, 2}), atol=1e-5, rtol=1e-5)
    assert (replaced - rm.lm(tokens))[:, 1:].abs().max() > 1e-3


def test_kept_positions_keep_the_models_own_output(make_replacement, prompt):
    rm = make_replacement("gpt2")
    tokens = tokens_of(rm, prompt)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    torch.testing.assert_close(rm.replaced_logits(tokens, masked=keep), rm.lm(tokens))
    torch.testing.assert_close(rm.replaced_logits(tokens)[:, 0], rm.lm(tokens)[:, 0])
    run = rm.clean(tokens)
    assert all((acts[:, 0] == 0).all() for acts in rm.features(run))
    assert all((acts[:, 1:] > 0).any() for acts in rm.features(run))
    for layer, error in enumerate(rm.errors(run)):
        torch.testing.assert_close(error[:, 0], run.mlp_out[layer][:, 0])


def test_keep_mask_names_the_first_position_bos_and_sinks(make_tiny, make_replacement, prompt):
    rm = make_replacement("gpt2")
    assert rm.masked_positions(torch.tensor([[5, 0, 5], [0, 1, 2]])).tolist() == [[True, False, False]] * 2
    assert rm.masked_positions(torch.tensor([[5, 0]]), start=3).tolist() == [[False, False]]
    core = Tokenizer(models.WordLevel({"<s>": 28, "<unk>": 30}, unk_token="<unk>"))
    lm = LanguageModel(make_tiny("gpt2").model, PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"))
    tokens = lm.tokenize(prompt)
    with lm.capture() as sites:
        lm(tokens[None])
    norms, written = sites.resid[1][0].norm(dim=-1), sites.mlp_out[2][0].norm(dim=-1)
    largest = {norms.argmax().item(), written.argmax().item()}

    def below_the_largest(values):
        return {"limit": values.topk(2).values.mean().item(), "sinks_in_sample": True}

    limits = {"resid": {"1": below_the_largest(norms)}, "mlp_out": {"2": below_the_largest(written)}}
    transcoder = make_replacement("gpt2").transcoder
    transcoder.meta = {"masked": {"bos": 28, "sinks": "auto", "limits": limits, "sample_rows": 1000}}
    bos = {position for position, token in enumerate(tokens.tolist()) if token == 28}
    expected = [position in {0} | bos | largest for position in range(len(tokens))]
    rm = ReplacementModel(lm, transcoder)
    assert rm.masked_positions(tokens).tolist() == expected
    assert rm.clean(tokens[None]).masked[0].tolist() == expected


def test_local_replacement_gives_the_models_logits_and_features(family, make_replacement, prompt, tiny_models):
    for shape in SHAPES:
        rm = make_replacement(family, **shape)
        run = rm.clean(tokens_of(rm, prompt))
        torch.testing.assert_close(rm.local_logits(run), run.logits, atol=1e-10, rtol=1e-10)
    tight = 1e-9 if family in tiny_models.EXACT_FAMILIES and family != "gpt_neox" else 1e-5
    with rm.lm.freeze_attention():  # the family's own eager attention
        torch.testing.assert_close(run.logits, rm.lm(run.tokens), atol=tight, rtol=tight)


def test_a_prompt_of_one_token_has_no_features(make_replacement):
    rm = make_replacement("mistral")
    run = rm.clean(tokens_of(rm, [0]))
    assert not any(acts.any() for acts in rm.features(run))
    torch.testing.assert_close(rm.local_logits(run), run.logits)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox:sequential"])
def test_relu_mlps_are_their_own_transcoder(make_exact_replacement, family, prompt):
    rm = make_exact_replacement(family)
    tokens = tokens_of(rm, prompt)
    torch.testing.assert_close(rm.replaced_logits(tokens), rm.lm(tokens), atol=1e-6, rtol=1e-6)
    run = rm.clean(tokens)
    assert max(error[:, 1:].abs().max() for error in rm.errors(run)) < 1e-12


def test_some_layers_only(make_replacement, prompt):
    """A transcoder of layers 1 and 2 leaves layer 0 as it is."""
    rm = make_replacement("qwen3", layers=[1, 2])
    tokens = tokens_of(rm, prompt)
    with rm.lm.capture(("mlp_out",)) as clean:
        rm.lm(tokens)
    with (
        rm.lm.overwrite(TranscoderOutput(rm.transcoder, rm.masked_positions(tokens))),
        rm.lm.capture(("mlp_out",)) as sites,
    ):
        logits = rm.lm(tokens)
    torch.testing.assert_close(sites.mlp_out[0], clean.mlp_out[0])
    assert not torch.allclose(sites.mlp_out[1], clean.mlp_out[1])
    torch.testing.assert_close(rm.replaced_logits(tokens), logits)
    assert len(rm.activations(prompt)) == 2


def test_nothing_is_left_behind(make_replacement, prompt):
    rm = make_replacement("gemma3_text")
    tokens = tokens_of(rm, prompt)
    before = rm.lm(tokens)
    rm.replaced_logits(tokens)
    rm.local_logits(rm.clean(tokens))
    rm.transcoder.W_enc[1].data = rm.transcoder.W_enc[1].data[:, :3]  # makes the next pass fail halfway
    with pytest.raises(RuntimeError):
        rm.replaced_logits(tokens)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in rm.lm.model.modules())
    assert not any("crosslace" in entry for entry in AttentionInterface._global_mapping)
    torch.testing.assert_close(rm.lm(tokens), before, rtol=0, atol=0)


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_replacement, tmp_path):
    """A run's folder with its transcoder, and a model's folder beside it."""
    logging.disable_progress_bar()
    rm = make_replacement("llama", torch.float32)
    rm.lm.model.save_pretrained(tmp_path / "model")
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path / "model")
    meta = {"model": {"name": str(tmp_path / "model"), "revision": None, "fingerprint": rm.lm.fingerprint}}
    rm.transcoder.save(tmp_path / "run" / "transcoder", meta)
    return rm, tmp_path / "run"


def test_load_from_a_run_or_a_transcoder(saved, prompt):
    rm, run = saved
    expected = rm.replaced_logits(tokens_of(rm, prompt))
    for loaded in (
        ReplacementModel.load(run, device="cpu"),
        ReplacementModel.load(run / "transcoder", device="cpu"),
        ReplacementModel.load(run, model=rm.lm),
    ):
        torch.testing.assert_close(loaded.replaced_logits(tokens_of(rm, prompt)), expected)
    wide = ReplacementModel.load(run, ModelSettings(str(run.parent / "model"), dtype="float64", device="cpu"))
    assert wide.transcoder.dtype == torch.float64
    torch.testing.assert_close(wide.replaced_logits(tokens_of(rm, prompt)).float(), expected, atol=1e-4, rtol=1e-4)


def test_prompts_begin_as_the_texts_of_training_did(saved):
    """The token that texts were given in place of a missing BOS is in the transcoder's description."""
    rm, run = saved
    without = ReplacementModel.load(run)
    assert without.lm.tokenize("a").tolist() == [1]
    meta = dict(without.transcoder.meta) | {"masked": SinkRule(0).to_attributes()}
    rm.transcoder.save(run / "transcoder", meta)
    loaded = ReplacementModel.load(run)
    assert loaded.lm.tokenize("a").tolist() == [0, 1]
    assert loaded.trace("a").kept == {0: "first"}


@pytest.mark.parametrize("mode", ["free", "constrained", "direct"])
def test_decoders_that_stay_in_their_file_change_no_result(saved, prompt, mode):
    _, run = saved
    whole, lazy = (ReplacementModel.load(run, device="cpu", lazy_decoders=lazy) for lazy in (False, True))
    assert torch.equal(lazy.trace(prompt).rows, whole.trace(prompt).rows)
    feature = next(node for node in whole.trace(prompt).nodes if node.kind == "feature")
    off = [Intervention(feature.layer, str(feature.position), feature.index, value=3.0)]
    changed = [rm.intervene(prompt, off, mode).logits for rm in (whole, lazy)]
    torch.testing.assert_close(changed[1], changed[0])
    assert (changed[1] - whole.lm(tokens_of(whole, prompt))).abs().max() > 1e-4
    torch.testing.assert_close(*(rm.replaced_logits(tokens_of(rm, prompt)) for rm in (whole, lazy)))
    virtual = [virtual_weights(rm.transcoder, 1, 2, "inputs")[0] for rm in (whole, lazy)]
    assert torch.equal(*virtual)


def test_the_callers_transcoder_stays_as_it_is(make_tiny):
    transcoder = Transcoder(TranscoderSettings(features=8), 16, 3, seed=0)
    rm = ReplacementModel(make_tiny("llama", torch.float32), transcoder)
    assert all(weight.requires_grad for weight in transcoder.parameters())
    assert not any(weight.requires_grad for weight in rm.transcoder.parameters())


def test_another_models_transcoder_is_refused(saved, make_tiny, tiny_models):
    rm, run = saved
    other = tiny_models.make_tiny("llama", torch.float32, seed=5)
    with pytest.raises(UserError, match=f"fingerprint {rm.lm.fingerprint}.*{other.fingerprint}; force=true"):
        ReplacementModel.load(run, other)
    assert ReplacementModel.load(run, other, force=True).lm is other
    with pytest.raises(UserError, match=r"width 16 with 3 layers or more; .* has width 16 and 2 layers"):
        ReplacementModel.load(run, tiny_models.make_tiny("llama", torch.float32, num_hidden_layers=2), force=True)


def test_folders_that_do_not_help(make_replacement, tmp_path):
    with pytest.raises(UserError, match="nowhere is not there"):
        ReplacementModel.load(tmp_path / "nowhere")
    make_replacement("llama").transcoder.save(tmp_path / "bare")
    with pytest.raises(UserError, match="does not say which model"):
        ReplacementModel.load(tmp_path / "bare")
    assert isinstance(Transcoder.load(tmp_path / "bare"), Transcoder)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_names_a_setting(error):
    with pytest.raises(UserError, match="make batch smaller"), memory_named("batch"):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(FileNotFoundError), memory_named("batch"):
        raise FileNotFoundError(errno.ENOENT, "no such file")
    with pytest.raises(RuntimeError, match="shapes"), memory_named("batch"):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("prompt", "sentence"), [([], "prompt is empty"), ([1] * 65, "65 tokens, but the model's context holds 64")]
)
def test_bad_prompts(make_replacement, prompt, sentence):
    with pytest.raises(UserError, match=sentence):
        make_replacement("llama").activations(prompt)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lazy_decoders", [False, True])
def test_on_a_gpu(saved, prompt, lazy_decoders):
    rm, run = saved
    there = ReplacementModel.load(run, device="cuda", lazy_decoders=lazy_decoders)
    logits = there.replaced_logits(tokens_of(there, prompt))
    assert logits.is_cuda
    torch.testing.assert_close(logits.cpu(), rm.replaced_logits(tokens_of(rm, prompt)), atol=1e-4, rtol=1e-4)
    there.local_logits(there.clean(tokens_of(there, prompt)))
