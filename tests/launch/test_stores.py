"""What stores hold and what a harvest takes: `crosslace store` and `cache --plan`."""

from types import SimpleNamespace

import torch
from crosslace.data.store import StoreLayout, StoreWriter, write_store
from crosslace.launch.cli.main import main


def test_store_describes_verifies_lists_and_removes(tmp_path, capsys):
    x, number, path = torch.randn(500, 2, 32), torch.arange(500), tmp_path / "s"
    layout = StoreLayout(("resid", "mlp_out"), (0, 1), 32, "float32", 32, 128)
    for name in ("s", "deep/t"):
        write_store(
            tmp_path / name, {"resid": x, "mlp_out": x}, number, number, number, layout, held_out=100, shuffle_rows=128
        )
    assert main(["store", str(path), "verify=true"]) == 0
    assert "400 rows, 2 layers x 32" in capsys.readouterr().out.replace("\n", " ")
    shard = path / "train/resid/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:99] + b"\x01" + shard.read_bytes()[100:])
    assert main(["store", f"path={path}"]) == 0 and main(["store", str(path), "remove=true"]) == 2
    assert main(["store", str(path), "verify=true"]) == 2
    facts = path / "zarr.json"
    facts.write_text(facts.read_text().replace('"complete": true', '"complete": false'))
    capsys.readouterr()
    assert main(["store", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("deep/t" in line and "whole" in line and "100 held_out, 400 train" in line for line in lines)
    assert any(line.lstrip().startswith("s ") and "incomplete: 0 windows" in line for line in lines)
    with StoreWriter(path, layout, {"seed": 0}, {"train": 400, "held_out": 100}, 128):  # somebody writes it
        assert main(["store", str(tmp_path), "remove=true"]) == 2 and shard.is_file()
    assert main(["store", str(tmp_path), "remove=true"]) == 0 and not list(path.iterdir())
    assert main(["store", str(tmp_path / "deep/t")]) == 0
    assert main(["store", str(path)]) == 2 and main(["store", str(path), str(path)]) == 2


def test_cache_says_beforehand_what_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=20 * 10**9))  # on any machine
    words = ["cache", "--plan", "model=gpt2", "tokens=100M", f"store={tmp_path}/s", "store.held_out=0"]
    assert main(words) == 2  # 3.7 TB
    told = capsys.readouterr().out
    for part in ("3,688.21 GB (36.9 KB a token, float16)", "tokens/s at 200 tflops", "3 needed", "free at"):
        assert part in told, told
    assert main([*words, "machine.store=1GB"]) == 2
    assert "27.1K tokens/s at machine.store=1GB" in capsys.readouterr().out
    assert main([*words, "tokens=100K"]) == 0
    assert not (tmp_path / "s").exists()
