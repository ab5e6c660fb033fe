"""`then`: from a store to graphs in one command, and what the checkpoints were worth."""

import json
from pathlib import Path

import pytest
from crosslace.circuit.graph import Graph
from crosslace.launch.verbs import evaluate

SMALL = [
    "transcoder.features=48",
    "transcoder.k=4",
    "trainer.steps=30",
    "trainer.batch=128",
    "trainer.eval_tokens=128",
    "trainer.calibrate_tokens=512",
    "trainer.checkpoint_every=10",
    "trainer.keep_every=10",
    "wandb.mode=disabled",
    "eval.tokens=1200",
    "eval.calibration_tokens=1000",
    "eval.prompts=2",
    "eval.pairs=0",
    "eval.layers=false",
    "eval.controls=false",
    "features.tokens=2000",
    "features.top=2",
    "features.quantiles=1",
    "trace.max_nodes=200",
]


def test_one_command_leads_from_a_store_to_graphs_over_the_checkpoints(demo, crosslace, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    words = [
        f"run={run}",
        f"store={demo / 'store'}",
        *SMALL,
        "transcoder.read=resid",
        "then=[eval,features,trace,checkpoints]",
    ]
    ended = crosslace("train", *words)
    assert ended.code == 0, ended.err
    assert (run / "features" / "index.json.gz").is_file() and (run / "eval.json").is_file()
    graphs = [Graph.load(path.parent) for path in run.glob("graphs/*/graph.json")]
    assert len(graphs) == 2 and all(graph.metadata["asked"]["trace"]["max_nodes"] == 200 for graph in graphs)
    course = json.loads((run / "course.json").read_text())
    assert [row["step"] for row in course["rows"]] == [10, 20, 30]
    last = course["rows"][-1]
    assert last["features_held"] == last["edges_held"] == 1.0 and 0 < course["rows"][0]["features_held"] < 1
    assert last["nmse"] == pytest.approx(json.loads((run / "eval.json").read_text())["overall"]["nmse"])
    assert last["nmse"] < course["rows"][0]["nmse"]
    assert sorted(path.name for path in run.glob("graphs/*/steps/*")) == ["step-10", "step-20"]
    page = (run / "report.html").read_text()
    assert "Over the checkpoints" in page and "share of the last one" in page
    commands = [json.loads(line)["command"].split()[1] for line in (run / "commands.jsonl").read_text().splitlines()]
    assert commands == ["eval", "features", "trace", "train"]

    # What is done is not done again; a graph that is missing is.
    monkeypatch.setattr(evaluate, "evaluated", lambda *args: pytest.fail("done already"))
    gone = next(path for path in run.glob("graphs/*") if not (path / "steps").is_dir())
    for path in gone.iterdir():
        path.unlink()
    ended = crosslace("train", *words[:-1], "then=[eval,features,trace]")
    assert ended.code == 0 and "eval: done already" in ended.out and "features: done already" in ended.out
    assert (gone / "graph.json").is_file()


def test_a_wrong_setting_of_what_follows_is_refused_before_the_training(demo, crosslace, tmp_path: Path) -> None:
    words = [f"run={tmp_path / 'run'}", f"store={demo / 'store'}", *SMALL[:8]]
    ended = crosslace("train", *words, "then=[eval,features]", "features.topp=3")
    assert ended.code == 2 and "did you mean features.top" in ended.err
    ended = crosslace("train", *words, "then=[evil]")
    assert ended.code == 2 and "then" in ended.err
    ended = crosslace("train", *words, "eval.tokens=2000")
    assert ended.code == 2 and "eval.tokens is not used by `crosslace train`" in ended.err
    assert not (tmp_path / "run").exists()


def test_presets_go_on_to_graphs() -> None:
    from crosslace.launch.settings import compose_config

    for name in ("gpt2_plt", "gpt2_clt", "llama32_1b_clt", "gemma2_2b_plt"):
        config = compose_config("train", ["run=x", f"experiment={name}"])
        assert config.section("then").do == ["eval", "features", "trace"]
        assert compose_config("cache", [f"experiment={name}"]).values["store"]["path"]
