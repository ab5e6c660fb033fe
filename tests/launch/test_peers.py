"""The benchmark beside other trainers: what cannot be run is said, and the others go on."""

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from crosslace.data.errors import UserError
from crosslace.data.store import in_memory_store

OURS = "import json, sys; job = json.load(open(sys.argv[1])); seconds = job['steps'] / 10\n" + (
    "json.dump({'seconds': seconds, 'cpu_seconds': seconds, 'peak': 1e9}, open(job['out'] + '/done.json', 'w'))\n"
)
FIGURES = {"nmse": 0.1, "fvu": 0.1, "l0": 4.0, "dead": 0.0, "ce_recovered": 0.9, "kl": 0.2}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("benchmarks.peers.__main__")


def test_a_broken_environment_is_said_and_the_others_go_on(peers, monkeypatch, tmp_path, capsys):
    """One has lost its interpreter, in another a training fails half-way."""
    for program, (_, pinned, *_) in peers.ENVIRONMENTS.items():
        folder = tmp_path / "homes" / "-".join([program, pinned.partition("==")[2]])
        (folder / "bin").mkdir(parents=True)
        (folder / "ready").touch()
        if program == "llamascopium":
            (folder / "bin" / "python").write_text("#!/bin/sh\necho no such kernel\nexit 3\n")
            (folder / "bin" / "python").chmod(0o755)
    (tmp_path / "ours.py").write_text(OURS)
    monkeypatch.setenv("CROSSLACE_PEERS", str(tmp_path / "homes"))
    monkeypatch.setitem(peers.SCRIPTS, "crosslace", str(tmp_path / "ours.py"))
    bench = SimpleNamespace(lm=SimpleNamespace(name="model"), train=SimpleNamespace(layers=[0, 1]))
    for name, does in (
        ("prepare", lambda *_: bench), ("write_rows", lambda *_: None), ("load", lambda *_: None),
        ("figures", lambda *_: dict(FIGURES)),
    ):  # fmt: skip
        monkeypatch.setattr(peers, name, does)
    out, chart = tmp_path / "rows.jsonl", tmp_path / "chart.svg"
    options = peers.parse(
        ["--steps", "10,20", "--seeds", "0", "--store", str(tmp_path / "store"), "--out", str(out)]
        + ["--only", "sparsify,llamascopium,crosslace"]
    )
    peers.measure(options)
    said = capsys.readouterr().out
    assert "sparsify      default (signum): left out: its environment is broken" in said and "; remove " in said
    assert "llamascopium  CLT default, warm-up 7%: left out: exit status 3: no such kernel" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["program"] for row in rows} == {"crosslace"} and {row["steps"] for row in rows} == {10, 20}
    peers.measure(options)  # what was measured is not repeated
    assert len(out.read_text().splitlines()) == len(rows)
    assert "**equal tokens, 20 steps**" in peers.table(rows) and "**equal seconds" in peers.table(rows)
    peers.chart(rows, chart)
    assert "crosslace: CLT default" in chart.read_text()


def test_a_store_without_what_others_read_is_refused(peers, tmp_path):
    x = torch.randn(64, 2, 8)
    with pytest.raises(UserError, match=r"read=mlp_in is not in the store, which holds resid, mlp_out.*cache it again"):
        peers.write_rows(SimpleNamespace(train=in_memory_store(x, x)), tmp_path / "rows", 8, 2)
    assert not (tmp_path / "rows").exists()
