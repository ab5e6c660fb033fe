"""Sweeps: all combinations, checked first; what is complete is left alone; one failure does not stop the rest."""

import json
import os
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from crosslace.data.errors import SettingsError
from crosslace.launch.settings import grid, single_values, tidy
from crosslace.launch.verbs import evaluate, train

QUICK = [
    *("trainer.batch=128", "trainer.eval_tokens=128", "trainer.calibrate_tokens=256", "wandb.mode=disabled"),
    *("eval.tokens=1200", "eval.calibration_tokens=1000", "eval.prompts=0", "eval.pairs=0"),
    *("eval.layers=false", "eval.controls=false"),
]
SMALL = ["transcoder.features=16", "trainer.steps=10", *QUICK]


def test_combinations_are_named_after_what_varies() -> None:
    words = tidy("sweep", ["run=s", "store=x", "transcoder=clt,plt", "trainer.target_l0=4,8", "eval.tokens=2000"])
    found = grid(words)
    assert [one.name for one in found] == [
        "transcoder-clt_target_l0-4",
        "transcoder-clt_target_l0-8",
        "transcoder-plt_target_l0-4",
        "transcoder-plt_target_l0-8",
    ]
    assert found[0].words == ["store.path='x'", "transcoder=clt", "trainer.target_l0=4"]
    assert "transcoder=clt" in single_values(words)


def test_a_sweep_over_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="no setting has several values"):
        grid(["run=s", "trainer.steps=5"])


def test_a_contradiction_is_refused_before_the_first_run(demo: Path, crosslace, tmp_path: Path) -> None:
    store = f"store={demo / 'store'}"
    ended = crosslace("sweep", f"run={tmp_path / 's'}", store, *SMALL, "trainer.lr_warmup=0.1,0.9")
    assert ended.code == 2 and "trainer.lr_warmup" in ended.err
    assert not (tmp_path / "s").exists()


def test_a_sweep_ends_in_a_table_and_goes_on(demo: Path, crosslace, tmp_path: Path, monkeypatch) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3,99"]
    ended = crosslace("sweep", *words)
    assert ended.code == 1
    assert "2 of 3 runs are complete" in ended.out
    assert "k-99 failed: transcoder.k=99 is more than the 16 features" in ended.out
    assert (tmp_path / "s" / "report.html").is_file() and list((tmp_path / "s" / "plots").glob("*.png"))
    trained = []
    fit = train.fit
    monkeypatch.setattr(train, "fit", lambda job, folder: trained.append(folder.name) or fit(job, folder))
    assert crosslace("sweep", *words).code == 1
    assert trained == ["k-99"]


def test_a_second_call_with_other_settings_is_refused_not_answered_with_old_results(demo, crosslace, tmp_path) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3"]
    assert crosslace("sweep", *words).code == 0
    before = (tmp_path / "s" / "k-2" / "eval.json").read_text()
    ended = crosslace("sweep", *words, "trainer.steps=12")
    assert ended.code == 2 and "trainer.steps was 10, not 12" in ended.err
    assert (tmp_path / "s" / "k-2" / "eval.json").read_text() == before
    # Measured with other settings: the training stays, the figures are made again.
    weights = (tmp_path / "s" / "k-2" / "transcoder" / "transcoder.safetensors").stat().st_mtime_ns
    ended = crosslace("sweep", *words, "eval.tokens=1100")
    assert ended.code == 0
    assert json.loads((tmp_path / "s" / "k-2" / "eval.json").read_text())["tokens"] != json.loads(before)["tokens"]
    assert (tmp_path / "s" / "k-2" / "transcoder" / "transcoder.safetensors").stat().st_mtime_ns == weights


def test_where_training_begins_may_vary_and_a_crash_stops_nobody(demo, crosslace, tmp_path, monkeypatch) -> None:
    fit = train.fit

    def out_of_memory(job, folder):
        if "random" in folder.name:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        return fit(job, folder)

    monkeypatch.setattr(train, "fit", out_of_memory)
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2", "init=random,mlp"]
    ended = crosslace("sweep", *words)
    assert ended.code == 1 and "1 of 2 runs are complete" in ended.out
    assert "init-random failed: RuntimeError: CUDA out of memory" in ended.out
    assert "out_of_memory" in (tmp_path / "s" / "init-random" / "error.log").read_text()
    monkeypatch.undo()
    assert crosslace("sweep", *words).code == 0


def test_a_queued_run_is_not_queued_twice(tmp_path) -> None:
    from crosslace.launch.sweeps.running import QUEUED, queued

    assert not queued(tmp_path)
    (tmp_path / QUEUED).write_text(f"{time.time():.0f}")
    assert queued(tmp_path)
    (tmp_path / QUEUED).write_text(f"{time.time() - 1e6:.0f}")
    assert not queued(tmp_path)


def test_each_process_has_a_gpu_of_its_own(monkeypatch, tmp_path) -> None:
    """Three runs on two GPUs, two at once: never two on one, and names of CUDA_VISIBLE_DEVICES are kept."""
    from crosslace.launch.sweeps import running

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    now, seen, lock = [], [], threading.Lock()

    def command(one, words, environment):
        device = environment["CUDA_VISIBLE_DEVICES"]
        with lock:
            assert device not in now
            now.append(device)
            seen.append(device)
        time.sleep(0.2)
        with lock:
            now.remove(device)
        return "it broke" if one.folder.name == "1" else None

    monkeypatch.setattr(running, "_commands", command)
    job = SimpleNamespace(words=[], progress=lambda *args: None)
    waiting = [running.Combination(tmp_path / str(i), []) for i in range(3)]
    failed = running.in_processes(job, waiting, 2, [0, 1])
    assert set(seen) == {"3", "GPU-7"} and len(seen) == 3 and failed == {tmp_path / "1": "it broke"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert running.device_environment(1, 2) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert int(running.device_environment(None, 64)["OMP_NUM_THREADS"]) == 1


def test_runs_are_listed_compared_and_chosen(demo, crosslace, tmp_path) -> None:
    folder = tmp_path / "s"
    words = [f"run={folder}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3", "seed=0,1"]
    assert crosslace("sweep", *words).code == 0
    l0 = {path.parent.name: json.loads(path.read_text())["overall"]["l0"] for path in folder.glob("*/eval.json")}
    fewest = min(l0, key=l0.__getitem__)
    ended = crosslace("report", f"run={folder}", f"pick=min nmse where l0<={l0[fewest] + 1e-6}")
    assert ended.code == 0 and f"{fewest} it is: nmse" in ended.out
    assert "mean over seeds" in ended.out and ended.out.count("±") >= 2 * 3
    ended = crosslace("report", f"run={folder}", "pick=min nmse where l0<=0.1")
    assert ended.code == 2 and f"no run meets the choice; nearest are {folder / fewest}" in ended.err
    assert crosslace("report", f"run={folder}", "pick=best").code == 2
    (folder / "k-3_seed-1" / "transcoder" / "transcoder.json").unlink()
    (folder / "k-3_seed-0" / "eval.json").unlink()
    ended = crosslace("runs", f"run={tmp_path}")
    lines = {line.split()[0].rpartition("/")[2]: line for line in ended.out.splitlines() if "seed-" in line}
    assert len(lines) == 4 and "finished" in lines["k-2_seed-0"]
    assert "not evaluated" in lines["k-3_seed-0"] and "interrupted" in lines["k-3_seed-1"]
    ended = crosslace("runs", f"run={tmp_path}", "having=transcoder.k=2 and seed=1")
    assert ended.out.count("seed-") == 1
    ended = crosslace("runs", str(folder / "k-2_seed-0"), str(folder / "k-2_seed-1"))
    assert ended.code == 0 and "2 settings differ" in ended.out  # the seed, and what takes it over
    (folder / "k-3_seed-1" / "error.log").write_text("Traceback\nRuntimeError: it broke")
    assert "failed" in crosslace("runs", f"run={tmp_path}").out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib", "processes"])
def test_a_launcher_runs_the_sweep_in_processes(launcher: str, demo: Path, crosslace, tmp_path: Path) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3", f"launcher={launcher}"]
    ended = crosslace("sweep", *words)
    assert ended.code == 0, ended.out + ended.err
    assert "2 of 2 runs are complete" in ended.out
    for name in ("k-2", "k-3"):
        assert json.loads((tmp_path / "s" / name / "eval.json").read_text())["overall"]["l0"] > 0


def test_slurm_settings_are_configuration() -> None:
    from crosslace.launch.settings.compose import compose_config

    words = ["run=s", "launcher=slurm", "launcher.options.partition=gpu", "launcher.options.nodes=4"]
    options = compose_config("sweep", words).section("launcher").options
    assert options["partition"] == "gpu" and options["nodes"] == 4 and options["max_num_timeout"] > 0


def test_a_launcher_with_a_wrong_option_says_so(demo: Path, crosslace, tmp_path: Path) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3"]
    ended = crosslace("sweep", *words, "launcher=submitit_local", "launcher.options.odd=1")
    assert ended.code == 2 and "launcher submitit_local could not run the sweep" in ended.err


def test_a_sweep_for_wandb_agent_is_printed_and_its_commands_run(demo, crosslace, tmp_path, monkeypatch) -> None:
    """The agent's own code makes a command of it, which reaches `crosslace train` with a folder of the run's own."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    run = tmp_path / "a sweep"
    words = [f"run={run}", f"store={demo / 'store'}", *SMALL, "transcoder=clt,plt", "trainer.lr=1e-3,null"]
    ended = crosslace("sweep", *words, "print=wandb", "objective=min fvu")
    assert ended.code == 0 and not run.exists()
    sweep = yaml.safe_load(ended.out)
    assert sweep["metric"] == {"name": "held_out/fvu", "goal": "minimize"} and sweep["name"] == "a sweep"
    assert sweep["parameters"]["transcoder"] == {"values": ["clt", "plt"]}
    assert sweep["parameters"]["trainer.lr"] == {"values": [0.001, "null"]}
    args = create_sweep_command_args({"args": {"transcoder": {"value": "clt"}, "trainer.lr": {"value": 0.001}}})
    filled = {"${args_no_hyphens}": args["args_no_hyphens"]}
    command = [word for part in create_sweep_command(sweep["command"]) for word in filled.get(part, [part])]
    program = tmp_path / "bin" / "crosslace"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "WANDB_RUN_ID": "x7"}
    said = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == "train" and said.splitlines()[-2:] == ["transcoder=clt", "trainer.lr=0.001"]
    assert f"run={run}/x7" in said and "wandb.mode=online" in said and "eval." not in said
    assert crosslace("train", *said.splitlines()[1:], "plan=true").code == 0


def test_what_no_sweep_can_do_is_said(demo, crosslace, tmp_path, monkeypatch) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3"]
    said = {word: crosslace("sweep", *words, word) for word in ("sweeper=optuna", "objective=min kl", "print=yaml")}
    assert all(ended.code == 2 and len(ended.err.strip().splitlines()) == 1 for ended in said.values())
    assert "`wandb agent`" in said["sweeper=optuna"].err
    assert "nothing that a training writes" in said["objective=min kl"].err
    monkeypatch.setattr("crosslace.launch.sweeps.running.find_spec", lambda name: None)
    assert "crosslace[sweep]" in crosslace("sweep", *words, "launcher=joblib").err
    assert not (tmp_path / "s").exists()
    ended = crosslace("sweep", *words, "trainer.stepz=1,2")
    assert ended.code == 2 and "did you mean trainer.steps" in ended.err
    ended = crosslace("sweep", *words, "store.path=a b,a_b")
    assert ended.code == 2 and "two combinations would write one folder, k-2_path-a_b" in ended.err


def test_runs_of_a_sweep_are_one_group_and_say_what_they_cost(demo, crosslace, tmp_path, monkeypatch) -> None:
    groups, fit = [], train.fit
    note = lambda job, folder: groups.append(os.environ["WANDB_RUN_GROUP"]) or fit(job, folder)
    monkeypatch.setattr(train, "fit", note)
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3"]
    ended = crosslace("sweep", *words)
    assert groups == ["s", "s"] and "WANDB_RUN_GROUP" not in os.environ
    lines = [json.loads(line) for line in (tmp_path / "s" / "k-2" / "commands.jsonl").read_text().splitlines()]
    assert [line["command"].split()[1] for line in lines] == ["train", "eval"]
    assert lines[0]["scheduling"]["slurm_job_id"] == "77"
    assert "device_hours" in ended.out and "device_hours" in (tmp_path / "s" / "report.html").read_text()


def test_memory_is_given_back_between_runs(demo, crosslace, tmp_path, monkeypatch) -> None:
    """When a run begins, nothing is left of those before it: of one that ended, one that broke, two side by side."""
    from crosslace.data.models import LanguageModel
    from crosslace.data.store import ActivationStore
    from crosslace.train.trainer import Trainer
    from crosslace.train.transcoder import Transcoder

    made: list[weakref.ref] = []
    left: list[list[str]] = []

    def noted(kind: type, begin: Callable[..., None]) -> None:
        def note(self, *args, **kwargs):
            made.append(weakref.ref(self))
            begin(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", note)

    def look() -> None:
        left.append([type(one).__name__ for ref in made if (one := ref()) is not None])

    for kind in (Trainer, Transcoder, ActivationStore, LanguageModel):
        noted(kind, kind.__init__)
    log, fit = Trainer._log, train.fit

    def broken(self, *args):
        if self.folder.name == "k-3":
            raise RuntimeError("CUDA out of memory")
        log(self, *args)

    monkeypatch.setattr(Trainer, "_log", broken)
    monkeypatch.setattr(train, "fit", lambda job, folder: look() or fit(job, folder))
    measure = evaluate.run
    monkeypatch.setattr(evaluate, "run", lambda job: look() or measure(job))
    words = [f"store={demo / 'store'}", *SMALL]
    assert crosslace("sweep", f"run={tmp_path / 'one'}", *words, "transcoder.k=2,3,4").code == 1
    assert crosslace("sweep", f"run={tmp_path / 'two'}", *words, "transcoder.k=2,3", "stack=true").code == 1
    assert len(made) > 10 and left == [[]] * 6  # three trainings and three evaluations begun
