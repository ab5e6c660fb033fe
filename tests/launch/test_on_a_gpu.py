"""The whole path on a GPU that is not there (`pretended_gpu.py`): where a tensor of the CPU meets one of the GPU, a
command ends. Figures are those of the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from crosslace.launch.cli.main import main

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("pretended_gpu.py")
DEMO = ["demo", "experiment=demo_quick", "wandb.mode=disabled", "trainer.steps=40", "eval.controls=true"]
QUESTION = "prompt=the capital of the state containing Dallas is"


def on_gpu(*commands: list[str]) -> list[dict]:
    """Each command's verb, and how many tensors it made on the GPU."""
    words = [[*command, "model.device=cuda:0"] for command in commands]
    ended = subprocess.run([sys.executable, WORKER, json.dumps(words)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"verb"')]


def figures(run: Path) -> dict[str, float]:
    measured = json.loads((run / "eval.json").read_text())
    return measured["overall"] | {"kl": measured["behaviour"]["kl"]}


def test_the_path_of_the_demo_and_what_it_leaves_out(tmp_path: Path) -> None:
    here, there = tmp_path / "cpu", tmp_path / "gpu"
    assert main([*DEMO, f"run={here}"]) == 0
    store, short = f"store={there / 'store'}", ["trainer.steps=6", "trainer.eval_every=3", "wandb.mode=disabled"]
    small = ["transcoder.features=64", "trainer.batch=128", "trainer.eval_tokens=512", "trainer.calibrate_tokens=512"]
    ring = [f"store={tmp_path / 'ring'}", "store.mode=streaming", "store.shuffle_rows=2048", "world=tiny", "tokens=8K"]
    seen = on_gpu(
        [*DEMO, f"run={there}"],
        ["trace", f"run={there / 'clt'}", QUESTION, "heads=true"],
        ["train", store, f"run={tmp_path / 'dense'}", *short, *small, "transcoder=plt",
         "transcoder.activation=jumprelu", "trainer.sparse=off", "trainer.accumulate=2", "trainer.target_l0=4",
         "trainer.optimizer=muon"],
        ["train", store, f"run={tmp_path / 'listed'}", *short, *small, "transcoder=clt", "transcoder.activation=topk",
         "trainer.sparse=on", "trainer.resample_every=2", "trainer.dead_after=100", "transcoder.skip=true"],
        ["train", *ring, f"run={tmp_path / 'streamed'}", *short, *small, "store.dtype=int8"],
    )  # fmt: skip
    assert [each["verb"] for each in seen] == ["demo", "trace", "train", "train", "train"]
    assert all(each["operations"] > 1000 for each in seen)
    for kind in ("clt", "plt"):
        cpu, gpu = figures(here / kind), figures(there / kind)
        for name in ("nmse", "l0_total", "kl"):
            assert gpu[name] == pytest.approx(cpu[name], rel=0.05), (kind, name)
    wrote = [json.loads((run / "summary.json").read_text()) for run in (here, there)]
    assert wrote[0].keys() == wrote[1].keys()


def test_the_stand_in_refuses_what_a_gpu_would() -> None:
    script = f"""
import sys; sys.path.insert(0, {str(WORKER.parent)!r})
import torch, pretended_gpu
pretended_gpu.install()
with pretended_gpu.Machine():
    x = torch.ones(3, device="cuda:0")
    weight = torch.nn.Parameter(torch.ones(3, device="cuda:0"))
    (weight * x).sum().backward()
    assert weight.grad.is_cuda and weight.grad.tolist() == [1.0, 1.0, 1.0] and (x + torch.tensor(1.0)).is_cuda
    def put() -> None:
        x[[0, 1]] = torch.ones(2)
    assert x[torch.tensor([0, 1])].is_cuda
    for refused in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x.long()], lambda: x.numpy(), put):
        try:
            refused()
        except RuntimeError:
            continue
        raise SystemExit("not refused")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
