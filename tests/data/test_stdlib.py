"""The stdlib corpus and its model: nothing is shipped, nothing downloaded."""

import json

import pytest
import torch
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.text.corpus import DatasetSettings, load_corpus
from crosslace.data.worlds import stdlib
from crosslace.data.worlds.bundled import is_held_out
from crosslace.data.worlds.stdlib import StdlibSettings, build_stdlib
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest):
    """The tiny stdlib model, built once for all test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLACE_CACHE", str(request.config.cache.mkdir("crosslace")))
        return build_stdlib(StdlibSettings(size="tiny"))


def test_files_are_sources_of_this_python():
    files = stdlib.files()
    assert len(files) > 200 and any(path.name == "argparse.py" for path in files)
    assert not any({"site-packages", "test"} & set(path.parts) for path in files)
    assert files == stdlib.files() and stdlib.identity() == stdlib.identity()


def test_the_model_has_learnt(folder):
    record = json.loads((folder / "stdlib.json").read_text(encoding="utf-8"))
    assert record["held_out"]["loss"] < 5.0 < torch.tensor(512.0).log()  # a uniform guess has 6.2
    assert record["held_out"]["perplexity"] == pytest.approx(2.718281828 ** record["held_out"]["loss"], rel=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("import os\nimport sys\n\n\ndef main():\n    return", return_tensors="pt")["input_ids"]
    assert tokens[0, 0] == tokenizer.bos_token_id
    assert model(tokens, labels=tokens).loss < 6.2
    assert tokenizer.decode(tokenizer("é ≤ 😀")["input_ids"], skip_special_tokens=True) == "é ≤ 😀"


def test_the_corpus_holds_out_what_the_model_never_saw(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = load_corpus(DatasetSettings(name="stdlib"), tokenizer)
    first = int(next(corpus.sequences("held_out")).document[0])
    assert first == next(i for i in range(10_000) if is_held_out(i, seed=0, share=stdlib.HELD_OUT_SHARE))
    sequence = next(corpus.sequences("train"))
    assert len(sequence.tokens) == 256 and sequence.tokens[0] == tokenizer.bos_token_id


def test_windows_are_a_function_of_the_step():
    shape = stdlib.SIZES["tiny"].shape
    stream = torch.arange(1000)
    ((tokens, weight),) = stdlib.Windows(stream, shape, seed=0)(7)
    ((again, _),) = stdlib.Windows(stream, shape, seed=0)(7)
    assert torch.equal(tokens, again) and tokens.shape == weight.shape == (shape.batch, shape.context)
    assert (tokens[:, 0] == 0).all() and (tokens[:, 2:] - tokens[:, 1:-1] == 1).all()
    large = stdlib.SIZES["large"].shape
    parts = [tokens for tokens, _ in stdlib.Windows(stream, large, seed=0)(7)]
    assert len(torch.cat(parts)) == large.batch and all(part.numel() <= stdlib.AT_ONCE for part in parts)


def test_bad_settings_and_a_python_without_sources(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"stdlib\.size=huge"):
        StdlibSettings(size="huge")
    with pytest.raises(SettingsError, match=r"stdlib\.steps=0"):
        StdlibSettings(steps=0)
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="holds no Python source"):
        stdlib.files()
