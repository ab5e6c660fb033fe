"""Publishing: a folder that both programs read, a card with the measured figures, and nothing sent unasked."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from crosslace.circuit.formats import import_circuit_tracer
from crosslace.train.transcoder import Transcoder


def test_a_run_becomes_a_folder_for_the_hub(demo: Path, crosslace, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("nobody asked for an upload"))
    out = tmp_path / "my-clt"
    ended = crosslace("publish", f"run={demo / 'clt'}", f"out={out}", "license=apache-2.0")
    assert ended.code == 0 and "ready, and not uploaded" in ended.out and "hf upload OWNER/my-clt" in ended.out
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0" and "circuit-tracer" in head["tags"]
    result = json.loads((demo / "clt" / "eval.json").read_text())
    assert f"| NMSE | {result['overall']['nmse']:.4g} |" in card and f"{result['behaviour']['kl']:.4g}" in card
    assert all(text in card for text in result["verdicts"])
    assert "hub:OWNER/my-clt" in card and "from circuit_tracer import ReplacementModel" in card
    ours, theirs = Transcoder.load(out / "crosslace"), import_circuit_tracer(out)
    assert all(torch.equal(a, b) for a, b in zip(ours.W_dec, theirs.W_dec, strict=True))
    texts = [path.read_text() for path in out.rglob("*.json")] + [card]
    assert not any(str(demo) in text or '"host"' in text for text in texts)
    ended = crosslace("publish", f"run={demo / 'clt'}", f"out={out}", "license=mit")
    assert ended.code == 2 and "is there already" in ended.err


def test_controls_stand_in_the_card_and_it_is_sent_where_told(
    demo: Path, crosslace, tmp_path: Path, monkeypatch
) -> None:
    import shutil

    import huggingface_hub

    run = shutil.copytree(demo / "plt", tmp_path / "plt")
    result = json.loads((run / "eval.json").read_text())
    row = {"nmse": 0.25, "ce_recovered": 0.5, "kl": 1.5, "top1": None}
    result["controls"] = {"transcoder": row, "untrained": row | {"nmse": 0.875}}
    (run / "eval.json").write_text(json.dumps(result))
    sent = []

    class Hub:
        def create_repo(self, place, private, exist_ok):
            sent.append((place, private))

        def upload_folder(self, repo_id, folder_path):
            sent.append(sorted(path.name for path in Path(folder_path).iterdir()))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    words = [f"run={run}", f"out={tmp_path / 'out'}"]
    ended = crosslace("publish", *words, "license=mit", "upload=me/plt")
    assert ended.code == 0 and "https://hub/me/plt" in ended.out
    assert sent[0] == ("me/plt", True) and {"README.md", "config.yaml", "crosslace"} <= set(sent[1])
    assert "| untrained | 0.875 | 0.5 | 1.5 |  |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "license is missing; it takes the licence under which you publish"),
        (["license=mit", "upload=nowhere"], "it takes OWNER/NAME"),
    ],
)
def test_what_is_missing_is_said(words, said, demo: Path, crosslace, tmp_path: Path) -> None:
    ended = crosslace("publish", f"run={demo / 'clt'}", f"out={tmp_path / 'out'}", *words)
    assert ended.code == 2 and said in ended.err and not (tmp_path / "out").exists()


def test_a_run_without_figures_is_not_published(demo: Path, crosslace, tmp_path: Path) -> None:
    ended = crosslace("publish", f"run={demo / 'clt' / 'transcoder'}", f"out={tmp_path / 'out'}", "license=mit")
    assert ended.code == 2 and "was not measured" in ended.err
