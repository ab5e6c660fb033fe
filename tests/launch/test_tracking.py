"""Weights & Biases' and TensorBoard's files in a run's folder, read back."""

import json
import struct
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from crosslace.data.errors import SettingsError, UserError
from crosslace.launch.workspace.processes import this_process
from crosslace.launch.workspace.tracking import TensorBoardSettings, WandbSettings, trackers

BLOCK, HEADER = (
    32768,
    struct.Struct("<IHB"),
)  # a LevelDB log: checksum, length, type (1 whole, 2 first, 3 middle, 4 last)
CONFIG = {"seed": 7, "trainer": {"steps": 20, "lr": 0.001}}


def records(path: Path) -> list[Any]:
    """What an offline run's file holds, as wandb's own protocol buffers."""
    protocol: Any = import_module("wandb.proto.wandb_internal_pb2")
    content, found, parts = path.read_bytes(), [], b""
    assert content[:4] == b":W&B"
    at = 7
    while at + HEADER.size <= len(content):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        parts += content[at + HEADER.size :][:length]
        at += HEADER.size + length
        if kind in (1, 4):
            record = protocol.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def finished(path: Path) -> list[Any]:
    """Its records once wandb's own process has written the last of them, a little after the run was closed."""
    until = time.monotonic() + 30
    while not (held := records(path)) or held[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < until, f"{path.name} was never closed"
        time.sleep(0.05)
    return held


def values(items: Any) -> dict[str, Any]:
    """Keys and values; a key of several parts leads into dictionaries."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        place = found
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return found


def follow(folder: Path, state: dict[str, Any], steps: range, tensorboard: bool = False) -> dict[str, Any]:
    """One process's share of a run: opened, logged to, closed."""
    this_process("cpu")  # Accelerate's trackers ask its state
    mode = "disabled" if tensorboard else "offline"
    (tracker,) = trackers(WandbSettings(mode), TensorBoardSettings(tensorboard), folder, CONFIG)
    tracker.resume(state)
    for step in steps:
        drawn = {"density/0": torch.rand(100), "theta/0": torch.rand(100)}
        tracker.log(step, {"nmse": 1 / step, "l0/0": 16.0}, drawn if step % 2 else {})
    kept = json.loads(json.dumps(tracker.state()))
    tracker.close({"held_out/nmse": 0.25})
    return kept


def test_an_offline_run_is_read_back_and_goes_on_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "clt"
    folder.mkdir()
    state = follow(folder, {}, range(1, 4))
    time.sleep(1)  # W&B names a run's folder by the second in which it is opened
    assert follow(folder, state, range(4, 6)) == state
    files = sorted(folder.rglob("run-*.wandb"))
    assert len(files) == 2 and all(state["id"] in path.name for path in files)

    history: dict[int, dict[str, Any]] = {}
    for path in files:
        held = finished(path)
        run = next(record.run for record in held if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.display_name, run.project) == (state["id"], "clt", "crosslace")
        config = values(run.config.update)
        assert config["seed"] == 7 and config["trainer"] == CONFIG["trainer"]
        for record in held:
            if record.WhichOneof("record_type") == "history":
                line = values(record.history.item)
                history[line["_step"]] = line
        summary: dict[str, Any] = {}
        for record in held:
            if record.WhichOneof("record_type") == "summary":
                summary |= values(record.summary.update)
        assert summary["held_out/nmse"] == 0.25
    assert sorted(history) == [1, 2, 3, 4, 5]
    assert [history[step]["nmse"] for step in (1, 2, 4)] == [1.0, 0.5, 0.25]
    for name in ("density/0", "theta/0"):
        drawn = history[5][name]
        assert drawn["_type"] == "histogram" and sum(drawn["values"]) == 100 and name not in history[4]


def test_tensorboard_goes_on_where_the_checkpoint_stood(tmp_path: Path) -> None:
    """Steps 3 and 4 were logged after the checkpoint of step 2, and a killed process left them: they come once."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    follow(tmp_path, {}, range(1, 5), tensorboard=True)
    assert follow(tmp_path, {"step": 2}, range(3, 7), tensorboard=True) == {"step": 6}
    held = reading.EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}
    )
    held.Reload()
    assert [(event.step, event.value) for event in held.Scalars("nmse")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 7)
    ]
    assert [event.step for event in held.Histograms("density/0")] == [1, 3, 5]
    assert held.Histograms("theta/0")[0].histogram_value.num == 100
    assert held.Scalars("last/held_out/nmse")[-1].value == 0.25
    assert b'"steps": 20' in held.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_that_is_missing_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    with pytest.raises(UserError, match="pip install tensorboard"):
        follow(tmp_path, {}, range(1, 2), tensorboard=True)


def test_disabled_there_is_nothing_to_listen_and_other_modes_are_refused(tmp_path: Path) -> None:
    assert trackers(WandbSettings(mode="disabled"), TensorBoardSettings(), tmp_path, {}) == []
    with pytest.raises(SettingsError, match=r"wandb\.mode=off"):
        WandbSettings(mode="off")
