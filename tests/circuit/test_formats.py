"""Foreign weight folders: what is written is read back the same, and what is wrong is refused in one sentence."""

import json

import pytest
import torch
import yaml
from crosslace.circuit.formats.circuit_tracer import export_circuit_tracer, import_circuit_tracer
from crosslace.circuit.formats.saelens import export_saelens, import_saelens
from crosslace.data.errors import UserError
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder
from safetensors.torch import load_file, save_file

L, D, F = 3, 8, 20


def make(reach="1", activation="jumprelu", skip=False, read="resid", sizes=None, layers=L, dtype=torch.float64):
    settings = TranscoderSettings(
        features=F, features_per_layer=sizes, reach=reach, activation=activation, skip=skip, read=read, theta_init=0.1
    )
    meta = {"model": {"name": "some/model"}}
    transcoder = Transcoder(settings, D, layers, seed=1, dtype=dtype, meta=meta)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random, dtype=torch.float64).to(dtype)
    return transcoder


def same(first, second, rows=64):
    x = torch.randn(rows, L, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for a, b in zip(first.encode(x), second.encode(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize(("reach", "skip"), [("1", False), ("1", True), ("2", False), ("all", False)])
@pytest.mark.parametrize("read", ["resid", "mlp_in"])
def test_circuit_tracer_round_trip(tmp_path, activation, reach, skip, read):
    transcoder = make(reach, activation, skip, read)
    folder = export_circuit_tracer(transcoder, tmp_path / "out")
    found = import_circuit_tracer(folder)
    assert found.settings.read == read and found.settings.skip == skip and found.dtype == torch.float64
    assert found.kind == ("plt" if reach == "1" else "clt")
    assert found.meta["model"]["name"] == "some/model"
    same(transcoder, found)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("read", ["resid", "mlp_in"])
def test_saelens_round_trip(tmp_path, activation, skip, read):
    transcoder = make("1", activation, skip, read, sizes=[F, F + 1, F + 2])
    folder = export_saelens(transcoder, tmp_path / "out")
    same(transcoder, import_saelens(folder))
    assert import_saelens(folder).settings.read == read
    one = import_saelens(folder / "layer_1")
    assert one.layers == [1] and one.features == [F + 1]


def test_topk_is_exported_at_its_calibrated_thresholds(tmp_path):
    """Foreign folders have no choice by token; the project's own keeps it."""
    topk, thresholds = make("1", "topk"), [0.2, 0.3, 0.4]
    topk.meta["thresholds"] = thresholds
    x = torch.randn(50, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = topk.encode(x, thresholds=[torch.tensor(theta) for theta in thresholds])
    for number, (write, read) in enumerate(
        [(export_circuit_tracer, import_circuit_tracer), (export_saelens, import_saelens)]
    ):
        found = read(write(topk, tmp_path / str(number)))
        for a, b in zip(expected, found.encode(x), strict=True):
            torch.testing.assert_close(a, b.to(a), rtol=0, atol=1e-6)
    assert Transcoder.load(topk.save(tmp_path / "own")).settings.activation == "topk"


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_folded_normalisation_survives_export(tmp_path, activation):
    """A transcoder of normalised activations, folded, calibrated, exported and read back: the same map of raw ones."""
    trained = make("all", activation)
    scale_in, scale_out = torch.tensor([0.5, 2.0, 3.0]).double(), torch.tensor([4.0, 0.25, 1.5]).double()
    thresholds = [torch.full((F,), 0.2 + 0.1 * l, dtype=torch.float64) for l in range(L)]
    given = None if activation == "jumprelu" else thresholds
    folder = export_circuit_tracer(trained.folded(scale_in, scale_out, given), tmp_path / "out")
    found = import_circuit_tracer(folder)
    x = torch.randn(50, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    acts = trained.encode(x * scale_in[:, None], thresholds=given)
    y = trained.decode(acts) / scale_out[:, None]
    for a, b in zip(acts, found.encode(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(y, found(x), rtol=0, atol=1e-6)


def test_the_folder_is_exactly_what_circuit_tracer_reads(tmp_path):
    plt = make("1", "jumprelu", skip=True)
    folder = export_circuit_tracer(plt, tmp_path / "plt", post_norm=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == {
        "model_kind": "transcoder_set",
        "model_name": "some/model",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }
    tensors = load_file(folder / "layer_2.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert shapes == {
        "W_enc": (F, D),
        "W_dec": (F, D),
        "b_enc": (F,),
        "b_dec": (D,),
        "activation_function.threshold": (F,),
        "W_skip": (D, D),
    }
    torch.testing.assert_close(tensors["activation_function.threshold"], plt.theta(2))  # linear, not its logarithm

    clt = export_circuit_tracer(make("2", read="mlp_in"), tmp_path / "clt", model_name="gpt2")
    config = yaml.safe_load((clt / "config.yaml").read_text())
    assert config["model_kind"] == "cross_layer_transcoder" and config["model_name"] == "gpt2"
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "mlp.hook_out")
    decoder = load_file(clt / "W_dec_0.safetensors")["W_dec_0"]
    assert decoder.shape == (F, L, D) and not decoder[:, 2].any()  # a window of two writes nothing to the third
    assert set(load_file(clt / "W_enc_1.safetensors")) == {"W_enc_1", "b_enc_1", "b_dec_1", "threshold_1"}
    assert "scan" not in config


REFUSED_EXPORTS = [
    (export_circuit_tracer, {"reach": "all", "skip": True}, "skip has no form"),
    (export_circuit_tracer, {"activation": "topk"}, "uncalibrated topk"),
    (export_circuit_tracer, {"activation": "batchtopk"}, "uncalibrated batchtopk"),
    (export_circuit_tracer, {"sizes": [F, F, F + 1]}, "one width for all layers"),
    (export_circuit_tracer, {"layers": [1, 2, 3]}, "every layer from 0"),
    (export_saelens, {"reach": "all"}, "several layers"),
    (export_saelens, {"activation": "topk"}, "uncalibrated topk"),
]


@pytest.mark.parametrize(("export", "options", "sentence"), REFUSED_EXPORTS)
def test_what_a_format_cannot_hold_is_refused(tmp_path, export, options, sentence):
    with pytest.raises(UserError, match=sentence):
        export(make(**options), tmp_path / "out")
    assert not list(tmp_path.iterdir())  # and nothing is left behind


def test_a_folder_that_holds_something_is_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        export_circuit_tracer(make(), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def edit(path, change):
    """Change one safetensors file in place."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, tensor):
    return lambda tensors: tensors.__setitem__(key, tensor)


BROKEN_PLT = [
    (drop("b_enc"), "lacks b_enc"),
    (put("extra", torch.zeros(1)), "holds extra"),
    (put("W_dec", torch.zeros(F, D + 1)), r"W_dec has shape \[20, 9\] where \[20, 8\] belongs"),
    (put("W_enc", torch.zeros(F)), "it should have 2 dimensions"),
    (put("b_enc", torch.full((F,), float("nan"))), "not finite"),
    (put("b_enc", torch.zeros(F, dtype=torch.int64)), "not floating-point"),
    (put("activation_function.threshold", torch.full((F,), -1.0)), "negative thresholds"),
    (drop("activation_function.threshold"), "layer 1 has no thresholds while others do"),
]


@pytest.mark.parametrize(("change", "sentence"), BROKEN_PLT)
def test_a_broken_plt_folder_is_refused(tmp_path, change, sentence):
    folder = export_circuit_tracer(make(), tmp_path / "out")
    edit(folder / "layer_1.safetensors", change)
    with pytest.raises(UserError, match=sentence):
        import_circuit_tracer(folder)


def test_a_folder_without_a_layer_or_with_strange_names_is_refused(tmp_path):
    folder = export_circuit_tracer(make(), tmp_path / "out")
    config = yaml.safe_load((folder / "config.yaml").read_text())

    def write(**changes):
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))

    for name in ("../../elsewhere.safetensors", "/etc/passwd", "hf://some/repo/../a.npz", "..", 7):
        write(transcoders=[name, name, name])
        with pytest.raises(UserError, match=r"below the folder|is not a file on the hub"):
            import_circuit_tracer(folder)
    write(feature_input_hook="hook_attn_out")
    with pytest.raises(UserError, match="feature_input_hook is 'hook_attn_out'"):
        import_circuit_tracer(folder)
    write(model_kind="something")
    with pytest.raises(UserError, match="no model_kind"):
        import_circuit_tracer(folder)
    write(transcoders=[f"layer_{i}.safetensors" for i in range(L)])
    import_circuit_tracer(folder)
    write()
    (folder / "layer_1.safetensors").unlink()
    with pytest.raises(UserError, match="of layer 1, though it has later ones"):
        import_circuit_tracer(folder)
    (folder / "config.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="not readable YAML"):
        import_circuit_tracer(folder)
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        import_circuit_tracer(tmp_path)


def test_a_broken_clt_folder_is_refused(tmp_path):
    folder = export_circuit_tracer(make("all"), tmp_path / "out")
    edit(folder / "W_dec_1.safetensors", put("W_dec_1", torch.zeros(F, L, D)))
    with pytest.raises(UserError, match=r"W_dec_1 has shape \[20, 3, 8\] where \[20, 2, 8\] belongs"):
        import_circuit_tracer(folder)
    (folder / "W_dec_1.safetensors").write_bytes(b"\x80\x04not tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        import_circuit_tracer(folder)
    (folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"W_dec_1\.safetensors is missing"):
        import_circuit_tracer(folder)


BROKEN_SAELENS = [
    ({"architecture": "gated"}, "architecture is 'gated'"),
    ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
    ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
    ({"metadata": {"hook_name": "blocks.0.attn.hook_z"}}, "hook_name is 'blocks.0.attn.hook_z'"),
    (
        {"metadata": {"hook_name": "blocks.0.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}},
        "hook_name_out is",
    ),
    ({"metadata": {"hook_name": "blocks.2.hook_resid_mid"}}, "two transcoders of layer 2"),
    ({"architecture": "skip_transcoder"}, "lacks W_skip"),
]


@pytest.mark.parametrize(("changes", "sentence"), BROKEN_SAELENS)
def test_a_broken_saelens_folder_is_refused(tmp_path, changes, sentence):
    folder = export_saelens(make(), tmp_path / "out")
    path = folder / "layer_0" / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=sentence):
        import_saelens(folder)


def test_an_empty_folder_is_no_saelens_transcoder(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="not a SAELens transcoder"):
            import_saelens(folder)


def test_a_relu_written_as_threshold_zero_is_read(tmp_path):
    folder = export_circuit_tracer(make(), tmp_path / "out")
    for i in range(L):
        edit(
            folder / f"layer_{i}.safetensors",
            put("activation_function.threshold", torch.zeros(F, dtype=torch.float64)),
        )
    found = import_circuit_tracer(folder)
    x = torch.randn(30, L, D, dtype=torch.float64)
    for acts, h in zip(found.encode(x), found.preactivations(x), strict=True):
        torch.testing.assert_close(acts, h.relu(), rtol=0, atol=1e-12)
