import json
import math

import pytest
import torch
from crosslace import Transcoder
from crosslace.data.errors import SettingsError, UserError
from crosslace.train.settings import TranscoderSettings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

L, D, B = 3, 8, 10


def make(activation="jumprelu", reach="all", dtype=torch.float64, **options) -> Transcoder:
    settings = TranscoderSettings(features=24, reach=reach, activation=activation, k=4, **options)
    return Transcoder(settings, D, L, dtype=dtype, seed=1)


def inputs() -> torch.Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("reach", ["1", "2", "all"])
@pytest.mark.parametrize("skip", [False, True])
def test_forward_is_the_formula(reach, skip):
    transcoder, x = make(reach=reach, skip=skip, features_per_layer=[24, 8, 16]), inputs()
    with torch.no_grad():
        for parameters in (transcoder.W_skip, transcoder.b_dec, transcoder.b_enc):
            for parameter in parameters:
                parameter.normal_()
    width = {"1": 1, "2": 2, "all": L}[reach]
    expected = torch.zeros(B, L, D, dtype=torch.float64)
    for b in range(B):
        for target in range(L):
            total = transcoder.b_dec[target].clone()
            if skip:
                total = total + transcoder.W_skip[target] @ x[b, target]
            for source in range(max(0, target - width + 1), target + 1):
                h = transcoder.W_enc[source] @ x[b, source] + transcoder.b_enc[source]
                a = h * (h > transcoder.theta(source))
                total = total + a @ transcoder.W_dec[source][:, target - source]
            expected[b, target] = total.detach()
    assert torch.allclose(transcoder(x), expected, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("reach", ["1", "2", "all"])
def test_sparse_and_dense_activations_decode_alike(activation, reach):
    transcoder, x = make(activation, reach), inputs()
    dense, sparse = transcoder.encode(x), transcoder.encode(x, sparse=True)
    for acts, pairs in zip(dense, sparse):
        assert torch.equal(acts, pairs.dense(acts.shape[1]))
        assert (pairs.indices[pairs.values == 0] == 0).all()
    assert torch.allclose(transcoder.decode(dense), transcoder.decode(sparse), atol=1e-12)
    for l in range(L):
        parts = transcoder.decode_from(l, dense[l])
        assert parts.shape == (B, transcoder.reach_at(l), D)
        assert torch.allclose(parts, transcoder.decode_from(l, sparse[l]), atol=1e-12)


def test_silent_features_decode_to_the_bias():
    transcoder, x = make("relu"), inputs()
    with torch.no_grad():
        for bias in transcoder.b_enc:
            bias.fill_(-1e3)
    acts = transcoder.encode(x, sparse=True)
    assert all(torch.equal(pairs.values, torch.zeros(B, 1, dtype=torch.float64)) for pairs in acts)
    assert torch.equal(transcoder.decode(acts), torch.zeros(B, L, D, dtype=torch.float64))


def test_topk_keeps_k_a_token_and_batchtopk_k_on_average():
    x = inputs()
    assert all((acts > 0).sum(1).max() <= 4 for acts in make("topk").encode(x))
    assert all((acts > 0).sum() == 4 * B for acts in make("batchtopk").encode(x))
    together = make("batchtopk", k_scope="all").encode(x)
    assert sum(int((acts > 0).sum()) for acts in together) == 4 * B * L


def test_one_layer_is_encoded_like_all():
    x = inputs()
    for activation in ("relu", "jumprelu", "topk"):
        transcoder = make(activation)
        for l, acts in enumerate(transcoder.encode(x)):
            assert torch.allclose(transcoder.encode_layer(x[:, l].view(2, 5, D), l), acts.view(2, 5, -1))
    with pytest.raises(UserError, match="fold it first"):
        make("batchtopk").encode_layer(x[:, 0], 0)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_folding_reads_and_writes_raw_activations(activation):
    transcoder, x = make(activation, skip=True), inputs()
    in_scale, out_scale = torch.tensor([2.0, 0.5, 7.0]), torch.tensor([0.25, 4.0, 11.0])
    thresholds = transcoder.select(transcoder.preactivations(x)) if activation == "batchtopk" else None
    if thresholds is not None:
        thresholds = [tau * (1 - 1e-9) for tau in thresholds]
    folded = transcoder.folded(in_scale, out_scale, thresholds)
    raw = x / in_scale[:, None].double()
    assert torch.allclose(folded(raw) * out_scale[:, None].double(), transcoder(x), atol=1e-10)
    for l in range(L):
        assert torch.allclose(folded.encode(raw)[l], transcoder.encode(x)[l], atol=1e-10)
    assert folded.settings.activation == ("jumprelu" if activation == "batchtopk" else activation)
    for l in range(L):  # each token for itself
        assert torch.equal(folded.encode_layer(raw[:, l], l), folded.encode(raw)[l])


def test_k_may_differ_by_layer():
    x = inputs()
    for activation in ("topk", "batchtopk"):
        acts = make(activation, k_per_layer=[1, 2, 5]).encode(x)
        assert [float((acts_BF > 0).sum()) / B for acts_BF in acts] == [1, 2, 5]
    assert make("topk", k_per_layer=[1, 2, 5]).encode_layer(x[:, 2], 2).count_nonzero(-1).max() == 5
    with pytest.raises(SettingsError, match="k_per_layer has 2 numbers"):
        make("topk", k_per_layer=[1, 2]).encode(x)
    with pytest.raises(SettingsError, match="k_per_layer=0"):
        TranscoderSettings(k_per_layer=[3, 0])


def test_rescaling_a_feature_changes_nothing():
    transcoder, x = make(), inputs()
    before = transcoder(x)
    with torch.no_grad():
        transcoder.W_enc[0][3] /= 5
        transcoder.b_enc[0][3] /= 5
        transcoder.log_theta[0][3] -= torch.tensor(5.0, dtype=torch.float64).log()
        transcoder.W_dec[0][3] *= 5
    assert torch.allclose(transcoder(x), before, atol=1e-12)


def test_save_and_load_round_trip(tmp_path):
    transcoder, x = make(skip=True, dtype=torch.float32), inputs().float()
    transcoder.save(tmp_path / "t", {"model": {"fingerprint": "abc"}})
    loaded = Transcoder.load(tmp_path / "t")
    assert torch.equal(loaded(x), transcoder(x))
    assert loaded.meta["model"]["fingerprint"] == "abc"
    assert (loaded.settings, loaded.layers) == (transcoder.settings, transcoder.layers)
    assert Transcoder.load(tmp_path / "t", dtype=torch.bfloat16).dtype == torch.bfloat16
    described = json.loads((tmp_path / "t" / "transcoder.json").read_text())
    assert described["kind"] == "clt" and described["sites"] == {"read": "resid", "write": "mlp_out"}


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="no transcoder"):
        Transcoder.load(tmp_path)
    make().save(tmp_path)
    (tmp_path / "transcoder.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="damaged"):
        Transcoder.load(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "transcoder.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            Transcoder.load(tmp_path)


@pytest.fixture
def lazy_pair(tmp_path):
    """A transcoder in memory and the same with its decoders in their file."""
    whole = make(reach="2", dtype=torch.float32, features_per_layer=[24, 8, 16])
    whole.save(tmp_path)
    return whole, Transcoder.load(tmp_path, lazy_decoders=True)


ROWS = st.one_of(
    st.integers(-8, 7),
    st.slices(8),
    st.lists(st.integers(-8, 7), max_size=12).map(lambda ids: torch.tensor(ids, dtype=torch.long)),
    st.lists(st.booleans(), min_size=8, max_size=8).map(torch.tensor),
    st.just(torch.tensor([[1, 7], [0, 1]])),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, then=st.sampled_from([(), (0,), (1, 3), (slice(1),), (slice(None), slice(2, 5))]))
def test_rows_in_a_file_are_indexed_like_a_tensor(lazy_pair, rows, then):
    whole, lazy = lazy_pair
    if isinstance(rows, slice) and (rows.step or 1) < 0:
        rows = slice(None)  # tensors take none either
    assert torch.equal(lazy.W_dec[1][rows, *then], whole.W_dec[1][rows, *then])


def test_rows_beyond_the_last_are_refused_not_read(lazy_pair):
    for rows in (8, -9, torch.tensor([3, 8])):
        with pytest.raises(IndexError):
            lazy_pair[1].W_dec[1][rows]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_lazy_transcoder_is_the_transcoder(lazy_pair, sparse, tmp_path):
    whole, lazy = lazy_pair
    x = inputs().float()
    assert torch.allclose(lazy.decode(lazy.encode(x, sparse)), whole(x), atol=1e-6)
    assert not any(name.startswith("W_dec") for name, _ in lazy.named_parameters())
    assert torch.equal(lazy.to(torch.float64).W_dec[0][:], whole.W_dec[0].double())
    lazy.to(torch.float32).save(tmp_path / "copy")
    assert load_file(tmp_path / "copy" / "transcoder.safetensors").keys() == whole.state_dict().keys()
    for name, tensor in load_file(tmp_path / "copy" / "transcoder.safetensors").items():
        assert torch.equal(tensor, whole.state_dict()[name])


def test_lazy_rows_outlive_their_files_name_but_not_its_content(lazy_pair, tmp_path):
    whole, lazy = lazy_pair
    expected = whole.W_dec[2][3].clone()
    make(reach="2", dtype=torch.float32, features_per_layer=[24, 8, 16]).double().save(tmp_path)  # renamed over it
    assert torch.equal(lazy.W_dec[2][3], expected)
    again = Transcoder.load(tmp_path, lazy_decoders=True)
    with open(tmp_path / "transcoder.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match="shorter than it was"):
        again.W_dec[2][:]


def test_a_subset_of_layers_keeps_the_models_numbers():
    transcoder = Transcoder(TranscoderSettings(features=4, reach="2", layers=[1, 4]), D, [1, 4])
    assert transcoder.layers == [1, 4] and [transcoder.reach_at(l) for l in range(2)] == [2, 1]
    assert transcoder.kind == "clt" and Transcoder(TranscoderSettings(features=4, reach="1"), D, L).kind == "plt"


def test_decoder_norms_cover_the_whole_row_with_gradient():
    transcoder = make()
    norms = transcoder.decoder_norms(0)
    assert torch.allclose(norms, transcoder.W_dec[0].flatten(1).norm(dim=1))
    norms.sum().backward()
    assert torch.allclose(transcoder.W_dec[0].grad, transcoder.W_dec[0].detach() / norms.detach()[:, None, None])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"activation": "gelu"}, "transcoder.activation"),
        ({"k": 0}, "transcoder.k"),
        ({"features": 0}, "transcoder.features"),
        ({"reach": "some"}, "transcoder.reach"),
        ({"reach": "0"}, "transcoder.reach"),
        ({"layers": [2, 1]}, "transcoder.layers"),
        ({"layers": [0, 1], "features_per_layer": [3]}, "transcoder.features_per_layer"),
        ({"activation": "jumprelu", "bandwidth": 0.001}, "unit norm"),
        ({"activation": "jumprelu", "bandwidth": math.nan}, "transcoder.bandwidth"),
        ({"activation": "jumprelu", "theta_init": math.nan}, "transcoder.theta_init"),
        ({"reach": "²"}, "transcoder.reach"),
        ({"k_scope": "token"}, "transcoder.k_scope"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(SettingsError, match=message):
        TranscoderSettings(**setting)
