"""What the MLP reads is formed from the stored residual stream, by the norms that the store keeps."""

from dataclasses import replace

import pytest
import torch
from crosslace.circuit.replacement.local import LocalModel
from crosslace.data.errors import UserError
from crosslace.data.harvest import HarvestSettings, harvest
from crosslace.data.models import InputNorms
from crosslace.data.store import ActivationStore, in_memory_store
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.trainer import train
from crosslace.train.transcoder import INPUT_NORMS, Reading, Transcoder, read_chosen

from ..planted import RandomText
from ..tiny_models import LAYERS, TINY_FAMILIES, make_tiny


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_input_is_the_models_own_in_every_family(family):
    lm = make_tiny(family, torch.float32)
    tokens = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    with lm.capture(("resid", "mlp_in")) as sites:
        lm(tokens)
    norms = InputNorms.of(lm, [2, 0])
    norms = InputNorms.from_attributes(norms.to_attributes())
    for l, layer in enumerate((2, 0)):
        resid = sites.resid[layer].flatten(0, 1)[:, None]
        formed = norms.select([l])(resid)[:, 0]
        torch.testing.assert_close(formed, sites.mlp_in[layer].flatten(0, 1), atol=1e-5, rtol=1e-5)
    # by default a transcoder reads there, but for a family whose MLPs read the stream itself
    store = in_memory_store(formed[:, None], formed[:, None], attributes={INPUT_NORMS: norms.to_attributes()})
    assert read_chosen(TranscoderSettings(), store).read == ("resid" if family.startswith("olmo") else "mlp_in")


QUICK = ("gpt2", "gemma2")
OTHERS = [family for family in TINY_FAMILIES if family not in QUICK and not family.startswith("olmo")]


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)])
def test_a_transcoder_reads_after_the_norm_from_a_store_of_resid(family, tmp_path):
    """Rows that are formed train as rows that are stored do, and what comes of it reads the model's own site."""
    lm = make_tiny(family, torch.float32)
    settings = HarvestSettings(
        tokens="8000", dtype="float32", shuffle_rows=8000, batch_tokens=2048, sample_tokens=2000, block_rows=64,
        shard_rows=1024,
    )  # fmt: skip
    found = {}
    for name, sites in (("formed", ["resid", "mlp_out"]), ("stored", ["mlp_in", "mlp_out"])):
        path = tmp_path / name
        assert harvest(lm, RandomText(), replace(settings, path=str(path), sites=sites))
        rows = [ActivationStore.open(path, split=split) for split in ("train", "held_out")]
        trainer = TrainerSettings(steps=40, batch=256, eval_every=0, checkpoint_every=0, resample_every=0)
        shape = TranscoderSettings(features=32, k=4, reach="1")
        result = train(trainer, shape, *rows, run_dir=tmp_path / f"run-{name}")
        found[name] = result.evaluation["overall"]["nmse"]
    assert found["formed"] == pytest.approx(found["stored"], rel=0.03)
    assert ActivationStore.open(tmp_path / "formed").sites == ("resid", "mlp_out")
    transcoder = Transcoder.load(tmp_path / "run-formed" / "transcoder")
    assert transcoder.settings.read == "mlp_in"
    tokens = next(RandomText().sequences("held_out")).tokens[None]
    run = LocalModel(lm, transcoder).clean(tokens)
    x, y = (torch.stack([site[l][0, 1:] for l in range(LAYERS)], dim=1) for site in (run.read, run.mlp_out))
    assert (transcoder(x) - y).square().sum() / y.square().sum() < 2 * found["formed"]


def test_a_store_that_cannot_form_it_says_so():
    x = torch.randn(64, 2, 8)
    store = in_memory_store(x, x)
    with pytest.raises(UserError, match="made before stores kept the norms by which it is formed: cache it again"):
        Reading(store, "mlp_in", [0, 1])
    with pytest.raises(UserError, match="read=resid is not in the store, which holds mlp_in"):
        Reading(in_memory_store(x, x, read="mlp_in"), "resid", [0, 1])


def test_the_default_falls_back_on_what_a_store_has(caplog):
    x = torch.randn(64, 2, 8)
    assert read_chosen(TranscoderSettings(), in_memory_store(x, x, read="mlp_in")).read == "mlp_in"
    assert read_chosen(TranscoderSettings(read="resid"), in_memory_store(x, x)).read == "resid" and not caplog.messages
    assert read_chosen(TranscoderSettings(), in_memory_store(x, x, attributes={"model": {}})).read == "resid"
    assert "cached again, it serves transcoder.read=mlp_in" in caplog.text
    assert read_chosen(TranscoderSettings(), in_memory_store(x, x), init="mlp_in").read == "mlp_in"
