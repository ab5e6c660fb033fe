"""Every verb, for real, on the runs of a quick demo."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import crosslace
import pytest
import torch
import yaml
from crosslace import Transcoder
from crosslace.launch.workspace import runs

PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture
def clt(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo's cross-layer run, to write to."""
    return Path(shutil.copytree(demo / "clt", tmp_path / "clt"))


def test_the_demo_writes_its_summary(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert list(summary) == ["world", "transcoders", "graph", "swap", "seconds"]
    assert set(summary["world"]["families"]) == {"two_hop", "opposites", "acronyms"}
    for kind in ("clt", "plt"):
        assert list(summary["transcoders"][kind]) == ["nmse", "l0", "dead", "top1", "kl", "ce_recovered"]
        assert all(isinstance(value, float) for value in summary["transcoders"][kind].values())
    assert list(summary["graph"]) == ["prompt", "top_token", "replacement_score", "completeness", "path"]
    assert summary["graph"]["prompt"] == PROMPT and summary["graph"]["top_token"] == "Austin"
    assert list(summary["swap"]) == ["pairs", "success_rate", "control_success_rate"]
    assert list(summary["seconds"]) == ["world", "cache", "train", "eval", "features", "trace", "total"]
    first, state, last = summary["graph"]["path"]  # a transcoder of 300 steps need not name the right state
    assert (first, last) == ("Dallas", "Austin") and state.startswith("state: ")
    assert 0 <= summary["swap"]["control_success_rate"] <= summary["swap"]["success_rate"] <= 1
    assert summary["seconds"]["total"] >= sum(summary["seconds"][k] for k in ("cache", "train", "eval"))


def test_the_demos_page_needs_nothing_else(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert page.count("<svg") >= 6
    assert "Austin" in page
    links = [part.split('"')[0] for part in page.replace("href=", "src=").split('src="')[1:]]
    assert all(link.startswith("#") for link in links)
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_demos_runs_are_ordinary(demo: Path) -> None:
    for kind, reach in (("clt", "all"), ("plt", "1")):
        settings = yaml.safe_load((demo / kind / "config.yaml").read_text())
        assert settings["transcoder"]["reach"] == reach
        assert settings["model"]["name"] == "world"
        assert (demo / kind / "transcoder" / "transcoder.safetensors").is_file()
        assert (demo / kind / "metrics.jsonl").read_text().count("\n") > 10
    assert not list(demo.rglob("*.pkl")) and not list(demo.rglob("*.pt"))


def test_a_second_call_does_nothing_again(demo: Path, crosslace, tmp_path: Path) -> None:
    again = shutil.copytree(demo, tmp_path / "demo")
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*.safetensors")}
    settings = again / "config.yaml"
    (again / "report.html").unlink()
    ended = crosslace("demo", "experiment=demo_quick", "wandb.mode=disabled", f"run={again}")
    assert ended.code == 0
    assert (again / "report.html").is_file() and settings.is_file()
    assert before == {path: path.stat().st_mtime_ns for path in again.rglob("*.safetensors")}
    other = crosslace("demo", "experiment=demo_quick", f"run={again}", "trainer.steps=7")
    assert other.code == 2 and "trainer.steps was 300, not 7" in other.err


def test_a_demo_that_is_stopped_goes_on(crosslace, tmp_path: Path, demo: Path, monkeypatch) -> None:
    from crosslace.launch.verbs.demo import WorldDemo

    folder = shutil.copytree(demo, tmp_path / "demo")
    for name in ("summary.json", "stages/swap.json", "stages/trace.json", "swap.json"):
        (folder / name).unlink()
    with monkeypatch.context() as patch:

        def interrupted(self) -> None:
            raise KeyboardInterrupt

        patch.setattr(WorldDemo, "swap", interrupted)
        ended = crosslace("demo", "experiment=demo_quick", f"run={folder}")
        assert ended.code == 130 and "goes on from there" in ended.err
        assert (folder / "stages" / "trace.json").is_file() and not (folder / "summary.json").exists()
    assert crosslace("demo", "experiment=demo_quick", f"run={folder}").code == 0
    assert json.loads((folder / "summary.json").read_text())["swap"]["pairs"] == 8


def test_cache_then_train_then_resume(demo: Path, crosslace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = crosslace("cache", "world=tiny", "store=stores/w", "tokens=3K", "store.held_out=300")
    assert ended.code == 0 and "crosslace train store=stores/w" in ended.out
    train = ["train", "store=stores/w", "run=runs/a", "transcoder.features=32", "transcoder.k=4", "trainer.batch=128"]
    train += ["trainer.steps=20", "trainer.eval_tokens=128", "trainer.calibrate_tokens=256", "wandb.mode=disabled"]
    ended = crosslace(*train, "trainer.behaviour_tokens=2000", "trainer.eval_every=10")
    assert ended.code == 0 and "crosslace eval run=runs/a" in ended.out
    lines = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    measured = [(line["step"], line["held_out/kl"]) for line in lines if "held_out/ce_recovered" in line]
    assert [step for step, _ in measured] == [10, 20] and all(0 < kl < 20 for _, kl in measured)
    settings = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert settings["world"]["size"] == "tiny", "the run knows its store's world"
    before = Path("runs/a/transcoder/transcoder.safetensors").stat().st_mtime_ns
    ended = crosslace(*train)
    assert ended.code == 0 and "trained already" in ended.out
    assert Path("runs/a/transcoder/transcoder.safetensors").stat().st_mtime_ns == before
    ended = crosslace(*train, "trainer.lr=0.1")
    assert ended.code == 2 and "name another run" in ended.err
    ended = crosslace("train", "store=stores/w", "run=runs/b", "model=gpt2")
    assert ended.code == 2 and "holds activations of the language model world, not of" in ended.err
    ended = crosslace("train", "store=stores/w", "run=runs/b", "transcoder.features=8", "transcoder.k=9")
    assert ended.code == 2 and "more than the 8 features" in ended.err


def test_train_on_activations_as_they_stream(crosslace, tmp_path: Path) -> None:
    ended = crosslace(
        *("train", "world=tiny", f"store={tmp_path / 'ring'}", "store.mode=streaming", f"run={tmp_path / 'run'}"),
        *("store.tokens=3K", "store.held_out=300", "store.budget=50MB", "transcoder.features=32", "transcoder.k=4"),
        *("trainer.batch=128", "trainer.steps=20", "trainer.eval_tokens=128", "trainer.calibrate_tokens=256"),
        "wandb.mode=disabled",
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "transcoder" / "transcoder.json").is_file()


def test_eval_writes_figures_and_a_page(clt: Path, crosslace) -> None:
    (clt / "eval.json").unlink()
    small = ["eval.tokens=1200", "eval.calibration_tokens=1000", "eval.prompts=0", "eval.pairs=0", "eval.layers=false"]
    ended = crosslace("eval", f"run={clt}", *small, "eval.controls=false")
    assert ended.code == 0
    result = json.loads((clt / "eval.json").read_text())
    assert {"overall", "layers", "behaviour", "tokens"} <= set(result)
    assert (clt / "report.html").is_file()


def test_features_trace_and_labels(clt: Path, crosslace) -> None:
    shutil.rmtree(clt / "features")
    ended = crosslace("features", f"run={clt}", "features.tokens=1000")
    assert ended.code == 0 and "by truth" in ended.out
    some = (
        "labels.score=true",
        "labels.features=4",
        "labels.tokens=1000",
        "labels.held_out=1000",
        "features.tokens=1000",
    )
    ended = crosslace("features", f"run={clt}", *some)
    assert ended.code == 0 and "labels shuffled" in ended.out and "a random dictionary gets" in ended.out
    scores = json.loads((clt / "features" / "scores.json").read_text())
    assert [row["name"] for row in scores["table"]] == ["transcoder", "labels shuffled", "random", "neurons"]
    ended = crosslace("features", f"run={clt}", "labels.judge=endpoint", "labels.model=m")
    assert ended.code == 2 and "labels.url is empty" in ended.err
    ended = crosslace("trace", f"run={clt}", f"prompt={PROMPT}", "slug=dallas-2")
    assert ended.code == 0
    for said in ("replacement score", "completeness", "left out", "edges miss what the model computed", "widest path"):
        assert said in ended.out
    graph = crosslace_graph(clt / "graphs" / "dallas-2")
    assert graph.metadata["prompt"] == PROMPT
    assert graph.accounting["largest_violation"] < 1e-3
    assert (clt / "graphs" / "dallas-2" / "graph.svg").read_text().startswith("<svg")


def test_heads_are_traced_kept_and_exported(clt: Path, crosslace, tmp_path: Path) -> None:
    ended = crosslace("trace", f"run={clt}", f"prompt={PROMPT}", "slug=heads", "heads=true")
    assert ended.code == 0 and "heads.json" in ended.out
    assert re.search(r"L\dH\d from '.*'@\d+ looked at '.*'@\d+ \d+%", ended.out)
    assert re.search(r"by L\dH\d [+-]", ended.out), "a path says through which head its edges went"
    found = json.loads((clt / "graphs" / "heads" / "heads.json").read_text())
    assert found["format"] == "crosslace-heads" and len(found["attention"]) == 5
    out = tmp_path / "neuronpedia"
    assert crosslace("export", f"run={clt / 'graphs' / 'heads'}", "to=neuronpedia", f"out={out}").code == 0
    exported = json.loads((out / "heads.json").read_text())
    assert any("qk_tracing_results" in node for node in exported["nodes"])


def test_groups_are_proposed_tried_out_and_kept(clt: Path, crosslace) -> None:
    ended = crosslace("trace", f"run={clt}", f"prompt={PROMPT}", "slug=groups", "groups=true")
    assert ended.code == 0
    said = " ".join(ended.out.split())
    assert re.search(r"\d+ groups hold \d+% of the features' influence", said) and "with as many others alone" in said
    graph = crosslace_graph(clt / "graphs" / "groups")
    assert graph.supernodes
    for ids in graph.supernodes.values():
        assert len({graph.nodes[id].position for id in ids}) == 1
    graph.group("by hand", graph.nodes.ids("feature")[:2])
    graph.save(clt / "graphs" / "groups")
    again = ["slug=groups", "groups=true", "overwrite=true", "trace.max_nodes=8"]
    assert crosslace("trace", f"run={clt}", f"prompt={PROMPT}", *again).code == 0
    smaller = crosslace_graph(clt / "graphs" / "groups")
    proposed = set(smaller.supernodes) - {"by hand"}
    assert proposed == set(smaller.metadata["proposed"]) and set(graph.supernodes) - {"by hand"} - proposed


def test_graphs_of_prompts_that_end_alike_are_kept_apart(clt: Path, crosslace) -> None:
    other = PROMPT.replace("capital", "nickname")
    folders = [clt / "graphs" / f"of-the-state-containing-dallas-is{number}" for number in ("", "-2", "-3")]
    for prompt in (PROMPT, other, other):
        assert crosslace("trace", f"run={clt}", f"prompt={prompt}", "trace.max_nodes=5").code == 0
    assert [crosslace_graph(folder).metadata["prompt"] for folder in folders[:2]] == [PROMPT, other]
    assert not folders[2].exists()
    ended = crosslace("trace", f"run={clt}", f"prompt={PROMPT}", "trace.targets=[L1:0]", "slug=target")
    assert ended.code == 0 and "weight" in ended.out and "probability" not in ended.out
    targets = "trace.targets=[Austin,Texas,the,Austin@5]"
    ended = crosslace("trace", f"run={clt}", f"prompt={PROMPT}", targets, "slug=targets")
    assert ended.code == 0 and " Austin @5" in ended.out and " the" in ended.out


def test_no_result_is_written_over(clt: Path, crosslace) -> None:
    trace = ["trace", f"run={clt}", "slug=mine", "trace.max_nodes=20"]
    assert crosslace(*trace, f"prompt={PROMPT}").code == 0
    graph = crosslace_graph(clt / "graphs" / "mine")
    graph.group("by hand", [graph.nodes.ids("feature")[0]])
    graph.save(clt / "graphs" / "mine")
    for other in (["prompt=the bird of Texas is"], [f"prompt={PROMPT}", "trace.targets=[Texas]"]):
        ended = crosslace(*trace, *other)
        assert ended.code == 2 and "holds the graph of another question" in ended.err
    assert crosslace_graph(clt / "graphs" / "mine").supernodes == graph.supernodes
    for more in ([], ["trace.max_logits=2", "overwrite=true"]):  # the same question again; another one on purpose
        assert crosslace(*trace, f"prompt={PROMPT}", *more).code == 0
        assert crosslace_graph(clt / "graphs" / "mine").supernodes["by hand"]
    before = (clt / "eval.json").read_bytes(), (clt / "features" / "index.json.gz").read_bytes()
    for words in (["eval", "eval.tokens=1300"], ["features", "features.top=2"]):
        ended = crosslace(*words, f"run={clt}")
        assert ended.code == 2 and "overwrite=true" in ended.err and words[1].partition("=")[0] in ended.err
    assert before == ((clt / "eval.json").read_bytes(), (clt / "features" / "index.json.gz").read_bytes())
    assert crosslace("features", f"run={clt}", "features.top=2", "overwrite=true").code == 0


def crosslace_graph(folder: Path):
    return crosslace.Graph.load(folder)


def test_steer_changes_the_answer(clt: Path, crosslace) -> None:
    graph = crosslace_graph(clt / "graphs" / "dallas")
    ids = graph.nodes.ids("feature", position=len(graph.tokens) - 1)
    node = graph.nodes[max(ids, key=lambda id: float(graph.influence()[id]))]
    entry = f"[{{layer: {node.layer}, position: {node.position}, feature: {node.index}, times: -2}}]"
    ended = crosslace("steer", f"run={clt}", f"prompt={PROMPT}", f"set={entry}", "generate=2")
    assert ended.code == 0
    assert "before" in ended.out and "after" in ended.out
    ended = crosslace(
        "steer", f"run={clt}", f"prompt={PROMPT}", "set=[{layer: 1, position: 2:4, feature: 0, times: 0}]"
    )
    assert ended.code == 0
    patch = entry.replace("times: -2", "patch_from: the capital of the state containing Boston is, patch_position: -1")
    assert crosslace("steer", f"run={clt}", f"prompt={PROMPT}", f"set={patch}", "top=100000").code == 0
    several = entry.replace("times: -2", "times: [0, 1, -2]")
    ended = crosslace("steer", f"run={clt}", f"prompt={PROMPT}", f"set={several}", "generate=2")
    assert ended.code == 0
    for said in ("before:", "times=0:", "times=1:", "times=-2:"):
        assert said in ended.out
    for wrong, said in [
        (
            "[{layer: 1, position: 1, feature: 0, times: [1, 2]}, {layer: 1, position: 2, feature: 0, value: [1]}]",
            "equally long",
        ),
        ("[{layer: 1, feature: 0, times: 0}]", "position is missing"),
        ("[{layer: 1, position: 1, feature: 0, times: 0, odd: 1}]", "odd is not known"),
        ("[{layer: 1, position: 1, feature: 0}]", "give one of value, times"),
        ("[{layer: 1, position: 1, feature: 100000, value: 1}]", "has features 0 to"),
        ("[{layer: one, position: 1, feature: 1, value: 1}]", "takes a number"),
        ("[{layer: 1, position: 1, feature: 1, patch_from: 5}]", "it takes a text or token ids"),
        ("[{layer: 1, position: 1, feature: 1, patch_from: a, patch_position: b}]", "it takes a whole number"),
        ("[]", "set is missing"),
    ]:
        ended = crosslace("steer", f"run={clt}", f"prompt={PROMPT}", f"set={wrong}")
        assert ended.code == 2 and said in ended.err, wrong


@pytest.mark.parametrize(("kind", "form"), [("clt", "circuit-tracer"), ("plt", "circuit-tracer"), ("plt", "saelens")])
def test_export_and_import_are_inverse(kind: str, form: str, demo: Path, crosslace, tmp_path: Path) -> None:
    ended = crosslace("export", f"run={demo / kind}", f"to={form}", f"out={tmp_path / 'out'}")
    assert ended.code == 0, ended.err
    again = crosslace("export", f"run={demo / kind}", f"to={form}", f"out={tmp_path / 'out'}")
    assert again.code == 2 and "is there already" in again.err
    ended = crosslace("import", f"path={tmp_path / 'out'}", f"from={form}", f"run={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    before = crosslace_transcoder(demo / kind / "transcoder")
    after = crosslace_transcoder(tmp_path / "run" / "transcoder")
    x = torch.randn(5, before.n_layers, before.d_model)
    assert torch.allclose(before(x), after(x), atol=1e-5)


def crosslace_transcoder(folder: Path):
    return crosslace.Transcoder.load(folder)


def test_graphs_to_neuronpedia_and_back(demo: Path, crosslace, tmp_path: Path) -> None:
    ended = crosslace("export", f"run={demo / 'clt'}", "to=neuronpedia", f"out={tmp_path / 'np'}")
    assert ended.code == 0, ended.err
    path = tmp_path / "np" / "dallas.json"
    assert json.loads(path.read_text())["metadata"]["slug"] == "dallas"
    ended = crosslace("import", f"path={path}", "format=neuronpedia", f"run={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert crosslace_graph(tmp_path / "run" / "graphs" / "dallas").n_features > 0


def test_an_imported_transcoder_is_traced_with_a_model_that_is_named(demo: Path, crosslace, tmp_path: Path) -> None:
    crosslace("export", f"run={demo / 'clt'}", f"out={tmp_path / 'out'}")
    run = tmp_path / "run"
    ended = crosslace("import", f"path={tmp_path / 'out'}", f"run={run}", "model=world", "world=tiny")
    assert ended.code == 0, ended.err
    ended = crosslace("trace", f"run={run}", f"prompt={PROMPT}", "world=tiny")
    assert ended.code == 0 and "Austin" in ended.out, ended.err


def test_report_compares_runs(demo: Path, crosslace, tmp_path: Path) -> None:
    ended = crosslace("report", demo / "clt", demo / "plt", f"out={tmp_path / 'page.html'}")
    assert ended.code == 0, ended.err
    assert "clt" in ended.out and "plt" in ended.out
    assert (tmp_path / "page.html").is_file()


def test_the_python_of_the_specification(demo: Path, tmp_path: Path) -> None:
    model = crosslace.ReplacementModel.load(demo / "clt")
    graph = model.trace(PROMPT)
    n = len(graph.nodes)
    assert graph.adjacency.shape == (n, n)
    assert graph.logits and graph.scores() and graph.prune(node=0.8, edge=0.98)
    graph.save(tmp_path / "dallas")
    assert crosslace.Graph.load(tmp_path / "dallas").tokens == graph.tokens
    graph.to_neuronpedia(tmp_path / "dallas.json")
    one = crosslace.Intervention(layer=1, position=7, feature=3, times=0.0)
    model.intervene(PROMPT, [one], mode="constrained", layers=range(3))
    store = crosslace.ActivationStore.open(demo / "store")
    batch = store.batch(epoch=0, step=1, size=64).to("cpu", torch.float32)
    transcoder = crosslace.Transcoder.load(demo / "clt" / "transcoder")
    acts = transcoder.encode(batch.x)
    assert transcoder.decode(acts).shape == batch.y.shape


def test_view_serves_until_it_is_stopped(demo: Path) -> None:
    import signal
    import subprocess
    import sys
    import urllib.request

    command = [sys.executable, "-m", "crosslace.launch", "view", f"run={demo}", "view.open=false", "view.port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())  # the token becomes a cookie
        with opener.open(address, timeout=20) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert runs.read_json(demo / "summary.json")["graph"]["top_token"] == "Austin"


def test_view_asks_the_model_that_is_named(demo: Path, crosslace, tmp_path: Path, monkeypatch) -> None:
    """`model=...` on the command line stands over what the run was made with."""
    asked = []
    monkeypatch.setattr("crosslace.circuit.viewer.serve", lambda *given: asked.append(given[-1]))
    assert crosslace("view", f"run={demo}").code == 0
    own = asked[0](demo / "clt").lm
    other = shutil.copytree(own.name, tmp_path / "other")
    assert crosslace("view", f"run={demo}", f"model={other}").code == 0
    assert asked[1](demo / "clt").lm.name == str(other) != own.name


def test_view_writes_a_graphs_page_as_one_file(demo: Path, crosslace, tmp_path: Path) -> None:
    page = tmp_path / "dallas.html"
    assert crosslace("view", f"run={demo / 'clt'}", "graph=dallas", f"html={page}").code == 0
    assert "crosslace-data" in page.read_text() and "Austin" in page.read_text()
    for words, sentence in ((["graph=x", f"html={page}"], "has a graph x"), (["graph=dallas"], "belong together")):
        refused = crosslace("view", f"run={demo / 'clt'}", *words)
        assert refused.code == 2 and sentence in refused.err


def test_training_begins_with_a_finished_run(demo: Path, crosslace, tmp_path: Path) -> None:
    words = ["train", f"store={demo / 'store'}", "transcoder=clt", "transcoder.features=200", "trainer.steps=3"]
    words += ["transcoder.activation=jumprelu", "trainer.target_l0=8", "trainer.lr=1e-9", "wandb.mode=disabled"]
    assert crosslace(*words, f"run={tmp_path / 'warm'}", f"init={demo / 'plt'}").code == 0
    warm = Transcoder.load(tmp_path / "warm" / "transcoder")
    source = Transcoder.load(demo / "plt" / "transcoder")
    torch.testing.assert_close(warm.W_dec[0][:192, 0], source.W_dec[0][:, 0], rtol=1e-3, atol=1e-4)
    assert warm.W_dec[0][:192, 1:].detach().abs().max() < 1e-4  # it does not reach further yet
    refused = crosslace(*words, f"run={tmp_path / 'warm'}", "init=random")
    assert refused.code == 2 and "init was" in refused.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_stops_a_training_which_then_goes_on(
    demo: Path, crosslace, tmp_path: Path, number: int, code: int
) -> None:
    run = tmp_path / "run"
    words = ["train", f"store={demo / 'store'}", f"run={run}", "transcoder.features=64", "transcoder.k=4"]
    words += ["trainer.steps=400", "trainer.batch=64", "trainer.log_every=5", "wandb.mode=disabled"]
    command = [sys.executable, "-m", "crosslace.launch", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not (run / "metrics.jsonl").is_file() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=30) == code
        assert process.stdout is not None
        assert "and saved: run the same command again to go on" in process.stdout.read()
    assert not (run / "transcoder").exists() and list((run / "checkpoints").iterdir())
    reached = int(next((run / "checkpoints").iterdir()).name.removeprefix("step-"))
    assert 0 < reached < 400
    again = crosslace(*words)
    assert again.code == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 400
