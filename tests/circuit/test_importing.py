"""Other people's transcoders: folders in each format by its published description: read, folded, refused, streamed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from crosslace.circuit.formats import cached, import_transcoder, measured_nmse, open_foreign
from crosslace.circuit.formats import hub as hub_module
from crosslace.circuit.formats.folders import ForeignLayer
from crosslace.circuit.model import ReplacementModel
from crosslace.data.errors import UserError
from crosslace.train.transcoder import Transcoder
from safetensors.torch import save_file

L, D, F = 3, 16, 20  # the tiny models' layers and width


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def circuit_tracer_folder(
    folder: Path, read="hook_resid_mid", write="hook_mlp_out", dtype=torch.float32, **config
) -> Path:
    folder.mkdir()
    for i in range(L):
        tensors = {
            "W_enc": drawn(i, F, D),
            "W_dec": drawn(i + 9, F, D),
            "b_enc": drawn(i + 20, F),
            "b_dec": drawn(i, D),
        }
        tensors["activation_function.threshold"] = drawn(i, F).abs()
        save_file({key: value.to(dtype) for key, value in tensors.items()}, folder / f"layer_{i}.safetensors")
    hooks = {"feature_input_hook": read, "feature_output_hook": write}
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"model_kind": "transcoder_set", "model_name": "x", **hooks, **config})
    )
    return folder


def gemma_scope_folder(folder: Path, l0s=(7,)) -> Path:
    for i in range(L):
        for l0 in l0s:
            path = folder / f"layer_{i}" / "width_16k" / f"average_l0_{l0}"
            path.mkdir(parents=True)
            weights = {
                "W_enc": drawn(i, D, F),
                "W_dec": drawn(i + 9, F, D),
                "b_enc": drawn(i + l0, F),
                "b_dec": drawn(i, D),
            }
            np.savez(
                path / "params.npz", threshold=drawn(i, F).abs().numpy(), **{k: v.numpy() for k, v in weights.items()}
            )
    return folder


def loaded(source: Path, folder: Path, lm=None, **options) -> Transcoder:
    return Transcoder.load(import_transcoder(open_foreign(source, **options), folder, lm))


def test_weights_keep_their_stored_dtype_and_thresholds_get_more(tmp_path, make_tiny):
    transcoder = loaded(circuit_tracer_folder(tmp_path / "ct", dtype=torch.bfloat16), tmp_path / "run")
    assert {p.dtype for p in [*transcoder.W_enc, *transcoder.W_dec]} == {torch.bfloat16}
    assert {p.dtype for p in [*transcoder.b_enc, *transcoder.log_theta]} == {torch.float32}
    assert torch.equal(transcoder.W_enc[1], drawn(1, F, D).bfloat16())
    torch.testing.assert_close(transcoder.theta(2), drawn(2, F).abs().bfloat16().float())
    rm = ReplacementModel(make_tiny("llama", torch.bfloat16), transcoder)
    graph = rm.trace([3, 0, 17, 9, 9, 28, 4])
    assert graph.n_features > 5 and graph.accounting["largest_violation"] < 1e-4
    wide = ReplacementModel(rm.lm, transcoder.to(torch.float32)).trace([3, 0, 17, 9, 9, 28, 4])
    torch.testing.assert_close(graph.rows, wide.rows, rtol=1e-4, atol=1e-5)


def test_layers_are_written_before_the_next_is_read(tmp_path):
    """A transcoder of any size takes the memory of one layer."""
    foreign = open_foreign(circuit_tracer_folder(tmp_path / "ct"))
    random = torch.get_rng_state()
    events = []
    for i, layer in list(foreign.layers.items()):

        def read(layer=layer, i=i):
            events.append(("read", i + 1))
            return layer.read()

        foreign.layers[i] = ForeignLayer(layer.shapes, layer.dtype, read)
    import_transcoder(foreign, tmp_path / "run", progress=lambda what, done, total: events.append(("written", done)))
    assert events == [(what, layer) for layer in (1, 2, 3) for what in ("read", "written")]
    assert torch.equal(torch.get_rng_state(), random)  # no weight is drawn to be written over


def test_a_gain_is_folded_where_the_hook_lies_before_it(tmp_path, make_tiny):
    """Gemma Scope reads the normalised stream before the gain: the encoder's outputs are the same as there."""
    lm = make_tiny("gemma2", torch.float32)
    transcoder = loaded(gemma_scope_folder(tmp_path / "scope"), tmp_path / "run", lm)
    tokens = torch.tensor([[3, 0, 17, 9, 9, 28, 4]])
    with lm.capture(("resid", "mlp_in")) as sites:
        lm(tokens)
    for l in range(L):
        x = sites.resid[l]
        normalised = x / (x.square().mean(-1, keepdim=True) + lm.layers[l].mlp_norm.eps).sqrt()
        h = normalised @ drawn(l, D, F) + drawn(l + 7, F)
        expected = h * (h > drawn(l, F).abs())
        torch.testing.assert_close(transcoder.encode_layer(sites.mlp_in[l], l), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="the model is needed to fold the gain in"):
        loaded(tmp_path / "scope", tmp_path / "none")
    several = gemma_scope_folder(tmp_path / "several", (5, 70))
    with pytest.raises(UserError, match="layer 0 has transcoders of average L0 5, 70; l0= chooses"):
        open_foreign(several)
    torch.testing.assert_close(loaded(several, tmp_path / "l0", lm, l0=60).b_enc[0].detach(), drawn(70, F))


def second_layer(i: int, skip: bool, *decoders: int) -> dict[str, torch.Tensor]:
    """One layer's tensors by Gemma Scope 2's names; `decoders` stands between features and width."""
    tensors = {"w_enc": drawn(i, D, F), "w_dec": drawn(i + 9, F, *decoders, D), "b_enc": drawn(i, F)}
    tensors |= {"b_dec": drawn(i, D), "threshold": drawn(i, F).abs()}
    return tensors | ({"affine_skip_connection": drawn(i + 5, D, D)} if skip else {})


def second_config(folder: Path, layer: int | str, site: str = "pre_feedforward_layernorm") -> None:
    places = {
        "in": f"model.layers.{layer}.{site}.output",
        "out": f"model.layers.{layer}.post_feedforward_layernorm.output",
    }
    config = {f"hf_hook_point_{side}": name for side, name in places.items()}
    (folder / "config.json").write_text(json.dumps(config | {"model_name": "google/gemma-3-1b-pt", "l0": 20}))


def fires(x: torch.Tensor, i: int) -> torch.Tensor:
    h = x[:, i] @ drawn(i, D, F) + drawn(i, F)
    return h * (h > drawn(i, F).abs())


@pytest.mark.parametrize("place", ["its own folders", "a config of circuit-tracer's"])
def test_gemma_scope_2_has_its_own_names_and_a_skip(tmp_path, place):
    folder = tmp_path / "all"
    if place == "its own folders":
        for i in range(L):
            one = folder / f"layer_{i}_width_16k_l0_small_affine"
            one.mkdir(parents=True)
            save_file(second_layer(i, True), one / "params.safetensors")
            second_config(one, i)
    else:
        circuit_tracer_folder(folder, read="mlp.hook_in")
        for i in range(L):
            save_file(second_layer(i, True), folder / f"layer_{i}.safetensors")
    transcoder, x = loaded(folder, tmp_path / "run"), drawn(50, 4, L, D)
    for l in range(L):
        y = fires(x, l) @ drawn(l + 9, F, D) + drawn(l, D) + x[:, l] @ drawn(l + 5, D, D)
        torch.testing.assert_close(transcoder(x)[:, l], y, rtol=1e-5, atol=1e-5)
    if place == "its own folders":
        assert transcoder.meta["hooks"] == ["mlp.hook_in", "hook_mlp_out"]
        second_config(one, 2, "post_attention_layernorm")
        with pytest.raises(UserError, match=r"reads model\.layers\.2\.post_attention_layernorm\.output and writes"):
            open_foreign(folder)


@pytest.mark.parametrize("stored", ["all layers", "later layers"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_gemma_scope_2_crosses_layers(tmp_path, stored, skip, listed):
    """A file a layer, whose features write to all layers from their own on."""
    folder = tmp_path / "clt"
    folder.mkdir()
    for i in range(L):
        save_file(
            second_layer(i, skip, L if stored == "all layers" else L - i), folder / f"params_layer_{i}.safetensors"
        )
    second_config(folder, "{layer}")
    if listed:
        config = {"model_kind": "cross_layer_transcoder", "model_name": "google/gemma-3-1b-pt"}
        config |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
        config["transcoders"] = [f"params_layer_{i}.safetensors" for i in range(L)]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    transcoder, x = loaded(folder, tmp_path / "run"), drawn(50, 4, L, D)
    assert transcoder.reach == L and transcoder.settings.read == "mlp_in"
    for t in range(L):
        y = drawn(t, D) + (x[:, t] @ drawn(t + 5, D, D) if skip else 0)
        for l in range(t + 1):
            decoders = drawn(l + 9, F, L, D)[:, t] if stored == "all layers" else drawn(l + 9, F, L - l, D)[:, t - l]
            y = y + fires(x, l) @ decoders
        torch.testing.assert_close(transcoder(x)[:, t], y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_transcoder_many_times_larger_than_memory_is_imported(tmp_path):
    """Peak memory goes with one layer's encoder: 353 MB of weights in eight layers take hardly more than
    117 MB in four."""
    taken = []
    for layers, weights in ((4, 110e6), (8, 350e6)):
        folder = tmp_path / str(layers)
        taken.append(memory_of_import(folder, layers, features=4096, width=1024))
        assert (folder / "run" / "transcoder.safetensors").stat().st_size > weights
        transcoder = Transcoder.load(folder / "run", lazy_decoders=True)
        assert all(bool((transcoder.W_dec[l][4095] == l + 1).all()) for l in range(layers))
    assert taken[1] < 140 and taken[1] < taken[0] + 20, taken


def memory_of_import(folder, layers, features, width):
    """MiB that a process of its own needs to import a CLT of bfloat16 weights."""
    folder.mkdir()
    for i in range(layers):
        encoder = {f"W_enc_{i}": torch.full((features, width), 0.5, dtype=torch.bfloat16)}
        encoder |= {f"b_enc_{i}": torch.zeros(features), f"b_dec_{i}": torch.zeros(width)}
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        decoder = torch.full((features, layers - i, width), i + 1, dtype=torch.bfloat16)
        save_file({f"W_dec_{i}": decoder}, folder / f"W_dec_{i}.safetensors")
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder", **hooks}))
    script = """
import sys
from crosslace.circuit.formats import import_transcoder, open_foreign
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
import_transcoder(open_foreign(sys.argv[1]), sys.argv[2])
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(folder / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_takes_the_k_largest(tmp_path, skip):
    for i in range(L):
        path = tmp_path / "sp" / f"layers.{i}.mlp"
        path.mkdir(parents=True)
        tensors = {"encoder.weight": drawn(i, F, D), "encoder.bias": drawn(i, F), "W_dec": drawn(i + 9, F, D)}
        tensors |= {"b_dec": drawn(i, D)} | ({"W_skip": drawn(i + 5, D, D)} if skip else {})
        save_file(tensors, path / "sae.safetensors")
        (path / "cfg.json").write_text(
            json.dumps({"k": 4, "transcode": True, "skip_connection": skip, "activation": "topk"})
        )
    transcoder, x = loaded(tmp_path / "sp", tmp_path / "run"), drawn(50, 6, L, D)
    assert transcoder.settings.activation == "topk" and transcoder.settings.read == "mlp_in"
    for l in range(L):
        values, indices = (x[:, l] @ drawn(l, F, D).T + drawn(l, F)).relu().topk(4, dim=-1)
        y = torch.zeros(6, F).scatter(1, indices, values) @ drawn(l + 9, F, D) + drawn(l, D)
        y = y + x[:, l] @ drawn(l + 5, D, D).T if skip else y
        torch.testing.assert_close(transcoder(x)[:, l], y, rtol=1e-5, atol=1e-5)


def llamascopium_folder(folder: Path, clt: bool, **changed) -> Path:
    """One transcoder a layer, or a cross-layer one, as its training saves them, with norms of each place."""
    reads, writes = ([f"blocks.{l}.{name}" for l in range(L)] for name in ("mlp.hook_in", "hook_mlp_out"))
    config = {"d_model": D, "expansion_factor": F / D, "act_fn": "topk", "top_k": 4, "norm_activation": "dataset-wise"}
    norms = {
        f"dataset_average_activation_norm.{place}": torch.tensor(2.0 + i) for i, place in enumerate(reads + writes)
    }
    W_E, b_E = drawn(1, L, D, F), drawn(2, L, F)
    W_D, b_D = [drawn(10 + to, to + 1, F, D) for to in range(L)], [drawn(20 + l, D) for l in range(L)]
    for l in [0] if clt else range(L):
        path = folder / ("clt" if clt else f"layer_{l}")
        path.mkdir(parents=True)
        if clt:
            weights = {"W_E": W_E, "b_E": b_E}
            weights |= {
                f"{name}.{l}": part for name, parts in (("W_D", W_D), ("b_D", b_D)) for l, part in enumerate(parts)
            }
            kind = {"sae_type": "clt", "hook_points_in": reads, "hook_points_out": writes}
        else:
            weights = {"W_E": W_E[l], "b_E": b_E[l], "W_D": W_D[l][l], "b_D": b_D[l]}
            kind = {"sae_type": "sae", "hook_point_in": reads[l], "hook_point_out": writes[l]}
        save_file(
            {name: part.contiguous() for name, part in (weights | norms).items()}, path / "sae_weights.safetensors"
        )
        (path / "config.json").write_text(json.dumps(config | kind | changed))
    return folder


@pytest.mark.parametrize("clt", [False, True])
def test_llamascopium_chooses_by_activation_times_decoder_norm(tmp_path, clt):
    """Its own computation by hand: scale, encode, choose by h n, decode, scale back."""
    transcoder, x = loaded(llamascopium_folder(tmp_path / "ll", clt), tmp_path / "run"), drawn(50, 6, L, D)
    assert (transcoder.kind, transcoder.settings.read) == ("clt" if clt else "plt", "mlp_in")
    W_E, b_E, W_D = drawn(1, L, D, F), drawn(2, L, F), [drawn(10 + to, to + 1, F, D) for to in range(L)]
    acts = []
    for l in range(L):
        h = x[:, l] * (D**0.5 / (2 + l)) @ W_E[l] + b_E[l]
        targets = range(l, L) if clt else [l]
        n = torch.stack([W_D[to][l] for to in targets]).square().sum((0, 2)).sqrt()
        values, indices = (h * n).relu().topk(4, dim=-1)
        acts.append(torch.zeros(6, F).scatter(1, indices, values) / n)
    for to in range(L):
        y = sum(acts[l] @ W_D[to][l] for l in (range(to + 1) if clt else [to])) + drawn(20 + to, D)
        torch.testing.assert_close(transcoder(x)[:, to], y / (D**0.5 / (2 + L + to)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"act_fn": "batchtopk"}, "topk and relu have a form here"),
        ({"norm_activation": "token-wise"}, "scaled token by token"),
        ({"hook_point_in": "blocks.0.hook_attn_out"}, "of another kind than an MLP's"),
        ({"sae_type": "lorsa"}, "transcoders of a layer or one clt"),
    ],
)
def test_llamascopium_that_has_no_form_here_is_refused(tmp_path, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        open_foreign(llamascopium_folder(tmp_path / "ll", False, **changed))


def test_circuit_tracers_topk_stays_topk(tmp_path):
    folder = circuit_tracer_folder(tmp_path / "ct", activation_function="topk", k=3)
    transcoder = loaded(folder, tmp_path / "run")
    assert (transcoder.settings.activation, transcoder.settings.k) == ("topk", 3)
    (tmp_path / "ct" / "config.yaml").write_text((folder / "config.yaml").read_text().replace("k: 3\n", ""))
    with pytest.raises(UserError, match="says topk and no k"):
        open_foreign(folder)


@pytest.mark.parametrize(
    ("family", "read", "write", "sentence"),
    [
        ("phi", "hook_resid_mid", "hook_mlp_out", "reads hook_resid_mid, which tiny-phi has not"),
        (
            "llama",
            "hook_resid_pre",
            "hook_mlp_out",
            "the stream before attention; the MLPs of tiny-llama read it after",
        ),
        ("gemma2", "hook_resid_mid", "mlp.hook_out", "lies before the norm that tiny-gemma2 puts on"),
        ("olmo2", "ln2.hook_normalized", "hook_mlp_out", "tiny-olmo2 has no norm before its MLPs"),
    ],
)
def test_places_that_the_model_has_not_are_refused(tmp_path, make_tiny, family, read, write, sentence):
    lm = make_tiny(family, torch.float32)
    folder = circuit_tracer_folder(tmp_path / "ct", read, write)
    with pytest.raises(UserError, match=sentence):
        import_transcoder(open_foreign(folder), tmp_path / "run", lm)
    if read != "ln2.hook_normalized":  # imported without the model, it is refused when the two meet
        with pytest.raises(UserError, match=sentence):
            ReplacementModel(lm, loaded(folder, tmp_path / "later"))


def test_a_transcoder_that_does_not_fit_is_measured(tmp_path, make_exact_replacement):
    exact = make_exact_replacement("gpt2")
    assert max(measured_nmse(exact)) < 1e-20
    wrong = ReplacementModel(exact.lm, loaded(circuit_tracer_folder(tmp_path / "ct"), tmp_path / "run"))
    assert min(measured_nmse(wrong)) > 1


def test_from_pretrained_imports_once_and_traces(tmp_path, make_tiny, monkeypatch):
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path / "cache"))
    lm, folder = make_tiny("llama", torch.float32), circuit_tracer_folder(tmp_path / "ct")
    asked = []

    def snapshot(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns[0]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    rm = ReplacementModel.from_pretrained(lm, "hub:somebody/transcoders@main:ct")
    assert asked == [("somebody/transcoders", "main", "ct/*.safetensors")] * 2
    assert rm.trace([3, 0, 17, 9, 9, 28, 4]).n_features > 5
    monkeypatch.setattr("crosslace.circuit.formats.importing.stream", lambda *given: pytest.fail("imported twice"))
    assert cached(folder, tmp_path / "cache" / "transcoders", lm).is_dir()
    for wrong in ("hub:nobody", "nowhere at all"):
        with pytest.raises(UserError, match=r"hub:OWNER/NAME\[@revision\]"):
            hub_module.local_folder(wrong)
