"""Verbs on two and three real processes with unequal work, and which device each process takes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from crosslace.data.device import find_device, in_float64
from crosslace.data.errors import UserError
from crosslace.data.worlds.world import world as bundled
from crosslace.launch.cli.main import main

from .test_clusters import EVAL, TRAIN, different, files, finished, met, of_workers, same_transcoder, torchrun

CACHE = ["cache", "world=tiny", "store.held_out=500", "store.shuffle_rows=1000", "store.shard_rows=1024",
         "store.block_rows=64"]  # fmt: skip


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_store_has_the_same_bytes_however_many_processes_fill_it(count: int, tmp_path: Path) -> None:
    """Four windows and one of held-out rows: on two and on three processes some have more to do than others."""
    words = [*CACHE, "tokens=4K"]
    assert main([*words, f"store={tmp_path / 'alone'}"]) == 0
    torchrun(count, tmp_path / "notes", *words, f"store={tmp_path / 'together'}")
    alone, together = files(tmp_path / "alone"), files(tmp_path / "together")
    assert alone.keys() == together.keys() and [name for name in alone if alone[name] != together[name]] == []


def a_run(demo: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "transcoder").symlink_to(demo / "clt" / "transcoder")
    (folder / "config.yaml").write_text((demo / "clt" / "config.yaml").read_text())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_evaluation_and_features_are_the_same_on_several_processes(count: int, demo: Path, tmp_path: Path) -> None:
    runs = [a_run(demo, tmp_path / name) for name in ("alone", "together")]
    assert main(["eval", f"run={runs[0]}", *EVAL]) == 0
    torchrun(count, tmp_path / "eval", "eval", f"run={runs[1]}", *EVAL)
    one, several = (json.loads((run / "eval.json").read_text()) | {"made_with": None} for run in runs)
    # What frozen attention misses is measured on one process alone, as docs/evaluation.md says.
    assert one["faithfulness"].pop("attention") and "attention" not in several["faithfulness"]
    assert one.pop("steps") and "steps" not in several  # and so is how many steps a path takes
    # An untrained feature's threshold lies exactly on a row of the sample, so that rounding decides whether it fires.
    for name in ("untrained", "random"):
        drawn = [result["controls"].pop(name) for result in (one, several)]
        assert drawn[0].keys() == drawn[1].keys() and drawn[0]["kl"] == pytest.approx(drawn[1]["kl"], rel=1e-2)
    assert different(several, one) == []
    words = ["features.tokens=2000", "features.top=3"]
    assert main(["features", f"run={runs[0]}", *words]) == 0
    torchrun(count, tmp_path / "features", "features", f"run={runs[1]}", *words)
    one, several = (files(run / "features") for run in runs)
    assert one == several and one


@pytest.mark.slow
def test_what_follows_a_training_runs_on_two_processes_too(demo: Path, tmp_path: Path) -> None:
    """All measure and describe, the first alone traces: what one process makes, and every command noted once."""
    words = ["train", f"store={demo / 'store'}", *TRAIN, *EVAL, "eval.controls=false", "features.tokens=2000",
             "features.top=3", "trace.max_nodes=200", "then=[eval,features,trace]"]  # fmt: skip
    assert main([*words, f"run={tmp_path / 'alone'}"]) == 0
    torchrun(2, tmp_path / "notes", *words, f"run={tmp_path / 'together'}", "parallel.data=2")
    alone, together = tmp_path / "alone", tmp_path / "together"
    same_transcoder(together, alone)
    results = [json.loads((run / "eval.json").read_text()) for run in (alone, together)]
    assert results[1]["tokens"] == results[0]["tokens"] and results[1]["graph"].keys() == results[0]["graph"].keys()
    assert results[1]["overall"]["nmse"] == pytest.approx(results[0]["overall"]["nmse"], rel=1e-3)
    assert files(together / "features").keys() == files(alone / "features").keys()
    graphs = [sorted(path.parent.name for path in run.glob("graphs/*/graph.json")) for run in (alone, together)]
    assert graphs[0] == graphs[1] and len(graphs[0]) == 3
    noted = [json.loads(line) for line in (together / "commands.jsonl").read_text().splitlines()]
    assert sorted(line["command"].split()[1] for line in noted) == ["eval", "features", "trace", "train"]
    assert all(line["how"] == "done" for line in noted)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_streaming_training_is_the_same_on_several_processes(count: int, tmp_path: Path) -> None:
    words = ["train", "world=tiny", "store.mode=streaming", "store.held_out=500", "store.shuffle_rows=1000",
             "store.shard_rows=1024", "store.block_rows=64", "tokens=4K", *TRAIN, "trainer.batch=48"]  # fmt: skip
    assert main([*words, f"store={tmp_path / 's'}", f"run={tmp_path / 'alone'}"]) == 0
    mesh = f"parallel.data={count}"
    torchrun(count, tmp_path / "notes", *words, f"store={tmp_path / 't'}", f"run={tmp_path / 'together'}", mesh)
    same_transcoder(tmp_path / "together", tmp_path / "alone")


def test_accelerate_launch_starts_processes_by_its_configuration(demo: Path, tmp_path: Path) -> None:
    """Two processes, and the precision that the configuration asks for."""
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\n"
        "num_machines: 1\nnum_processes: 2\nmachine_rank: 0\nmain_process_port: 0\nuse_cpu: false\n"
    )
    words = ["train", f"store={demo / 'store'}", f"run={tmp_path / 'run'}", "parallel.data=2", *TRAIN]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    finished([*launcher, *of_workers(tmp_path / "notes", *words)])
    assert met(tmp_path / "notes") == [2, 2]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-40" / "state.json").read_text())
    assert state["trainer"]["precision"] == "bf16"


def test_accelerate_launch_on_the_cpu_keeps_off_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu` sets for its process, on a machine with GPUs that are not there."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    asked = [
        "--cpu",
        "--num_processes=1",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "train.py",
    ]
    arguments = launch_command_parser().parse_args(asked)
    arguments.use_cpu, arguments.num_cpu_threads_per_process = True, 1
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    with_gpus(monkeypatch, 8, ACCELERATE_USE_CPU=environment["ACCELERATE_USE_CPU"])
    assert find_device("auto") == torch.device("cpu")


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, **environment: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 8, LOCAL_RANK="5")
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 5)
    assert find_device("cuda:2") == torch.device("cuda", 2)
    with_gpus(monkeypatch, 8)
    assert find_device("auto") == torch.device("cuda", 0), "never a GPU without a number"
    with_gpus(monkeypatch, 1, LOCAL_RANK="5", CUDA_VISIBLE_DEVICES="5")  # a scheduler that shows each process its own
    assert find_device("auto") == torch.device("cuda", 0)
    with_gpus(monkeypatch, 8, LOCAL_RANK="5", ACCELERATE_USE_CPU="true")
    assert find_device("auto") == torch.device("cpu")
    with_gpus(monkeypatch, 4, LOCAL_RANK="5")
    with pytest.raises(UserError, match="process 5 of this machine has no GPU of its own: there are 4"):
        find_device("auto")


@pytest.mark.parametrize("verb", ["cache", "eval", "features", "train", "train from a stream"])
def test_verbs_take_the_device_before_anything_lies_on_it(
    verb: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With eight GPUs that are not there: the sixth process names its own before it loads a model or opens a store."""

    class Taken(Exception):
        pass

    def take(device: torch.device) -> None:
        raise Taken(str(device))

    with_gpus(monkeypatch, 8, LOCAL_RANK="5")
    monkeypatch.setattr(torch.cuda, "set_device", take)
    verb, _, streaming = verb.partition(" ")
    stream = ["store.mode=streaming", f"store={tmp_path / 'ring'}"]
    words = {"cache": CACHE[1:], "train": [*(stream if streaming else [f"store={demo / 'store'}"]), *TRAIN]}.get(
        verb, []
    )
    place = f"store={tmp_path / 'new'}" if verb == "cache" else f"run={tmp_path / 'run'}"
    if verb in ("eval", "features"):
        a_run(demo, tmp_path / "run")
    from crosslace.launch.verbs import cache, evaluate, features, train
    from crosslace.launch.workspace import start

    module = {"cache": cache, "eval": evaluate, "features": features, "train": train}[verb]
    with pytest.raises(Taken, match="cuda:5"):
        module.run(start(verb, [*words, place]))


def test_the_demo_asks_its_questions_on_the_model_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors: model and inputs on `cuda`; an index left on the CPU would be refused."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    seen = []

    class Questions:
        tokens = answer_tokens = staticmethod(lambda question: [1, 2])

    with FakeTensorMode():
        table = torch.nn.Embedding(10, 4, device="cuda")

        def model(tokens: torch.Tensor) -> torch.Tensor:
            seen.append(table(tokens).device.type)
            return torch.zeros(*tokens.shape, 10)

        with pytest.raises(DataDependentOutputException):  # fake logits have no values to read an answer from
            bundled.World.correct(Questions(), model, [0, 1], table.weight.device)
    assert seen == ["cuda"]


def test_sums_in_float64_leave_a_device_that_has_none() -> None:
    class OnMac:
        device = torch.device("mps")

        def cpu(self) -> torch.Tensor:
            return torch.ones(2)

    assert in_float64(OnMac()).dtype == torch.float64  # type: ignore[arg-type]


def test_an_accelerate_configuration_says_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from crosslace.launch.workspace.processes import this_process

    assert this_process("cpu").precision == "float32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert this_process("cpu").precision == "bf16"
