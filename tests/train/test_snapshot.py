"""A run's transcoder as it stood at a checkpoint."""

import shutil
from dataclasses import replace

import pytest
import torch
from crosslace import Transcoder
from crosslace.data.errors import UserError
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.snapshot import checkpoint_steps, transcoder_at
from crosslace.train.trainer import train

SETTINGS = TrainerSettings(steps=20, batch=64, checkpoint_every=10, eval_every=0, dead_after=2000, keep_checkpoints=9)


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
def test_the_last_checkpoint_is_the_export_and_earlier_ones_are_not(planted, tmp_path, activation):
    shape = TranscoderSettings(features=48, k=3, activation=activation)
    settings = replace(SETTINGS, target_l0=None if activation.endswith("topk") else 3.0)
    train(settings, shape, planted.train, planted.held_out, tmp_path)
    assert checkpoint_steps(tmp_path) == [10, 20]
    exported = Transcoder.load(tmp_path / "transcoder")
    last, earlier = (transcoder_at(tmp_path, step, planted.held_out) for step in (20, 10))
    assert last.settings == exported.settings and last.layers == exported.layers
    for name, tensor in last.state_dict().items():
        torch.testing.assert_close(tensor, exported.state_dict()[name], rtol=0, atol=0, msg=name)
    assert not torch.equal(last.W_enc[0], earlier.W_enc[0])


def test_what_cannot_be_opened_is_refused(planted, tmp_path):
    train(SETTINGS, TranscoderSettings(features=48, k=3), planted.train, planted.held_out, tmp_path)
    with pytest.raises(UserError, match="store is not known"):
        transcoder_at(tmp_path, 10)
    with pytest.raises(UserError, match="step-15 holds no checkpoint"):
        transcoder_at(tmp_path, 15, planted.held_out)
    shutil.rmtree(tmp_path / "transcoder")
    with pytest.raises(UserError, match="no transcoder"):
        transcoder_at(tmp_path, 10, planted.held_out)
