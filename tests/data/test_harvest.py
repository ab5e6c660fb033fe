"""From a model and a corpus to a store: what is kept, what is masked, and that nothing stops it for good."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crosslace.circuit.model import ReplacementModel
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.harvest import Harvester, HarvestSettings, harvest, weigh
from crosslace.data.models.attention_sinks import SinkRule
from crosslace.data.models.language_model import LanguageModel
from crosslace.data.store import shards, window
from crosslace.data.store.store import ActivationStore
from crosslace.data.text.corpus import TokenSequence
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder
from transformers import LlamaConfig, LlamaForCausalLM


class RandomText:
    """Documents of 5 to 39 random tokens, one a sequence."""

    name = fingerprint = "random"

    def __init__(self, documents: int = 900):
        self.documents = documents

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        given = 0
        for document in range(self.documents if split == "train" else 100):
            length = int(torch.randint(5, 40, (1,), generator=generator))
            tokens = torch.randint(1, 200, (length,), generator=generator)
            yield TokenSequence(tokens, torch.full((length,), document))
            given += length
            if limit_tokens and given >= limit_tokens:
                return


def tiny_model() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LanguageModel(LlamaForCausalLM(config), None, "tiny")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_model()


SETTINGS = HarvestSettings(
    tokens="9000",
    shuffle_rows=2048,
    batch_tokens=512,
    sample_tokens=2000,
    block_rows=64,
    shard_rows=1024,
    dtype="float32",
)


def to(path: Path, **changes) -> HarvestSettings:
    return replace(SETTINGS, path=str(path), **changes)


def tree(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }


def test_rows_are_what_the_model_computes(lm, tmp_path):
    corpus = RandomText()
    assert harvest(lm, corpus, to(tmp_path / "s"))
    documents = {int(s.document[0]): s.tokens for s in corpus.sequences()}
    store = ActivationStore.open(tmp_path / "s")
    assert len(store) == 9000
    seen = set()
    for batch in store.rows_in_order(1000):
        assert (batch.position > 0).all()
        seen |= set(zip(batch.document.tolist(), batch.position.tolist()))
    assert len(seen) == 9000
    batch = store.batch(0, 0, 40)
    for row in range(40):
        tokens = documents[int(batch.document[row])]
        with lm.capture() as captured:
            lm(tokens[None])
        place = int(batch.position[row])
        assert tokens[place] == batch.token[row]
        for layer in range(3):
            torch.testing.assert_close(batch.resid[row, layer], captured.resid[layer][0, place], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                batch.mlp_out[row, layer], captured.mlp_out[layer][0, place], atol=1e-5, rtol=1e-4
            )
    assert store.attributes["model"]["fingerprint"] == lm.fingerprint
    assert store.attributes["masked"]["rows"]["first"] > 300
    held_out = ActivationStore.open(tmp_path / "s", "held_out")
    assert len(held_out) == 450
    assert held_out.attributes["masked"]["limits"] == store.attributes["masked"]["limits"]


def test_any_number_of_processes_writes_the_same_store(lm, tmp_path):
    assert harvest(lm, RandomText(), to(tmp_path / "one"))
    for index in (2, 0, 1):
        whole = harvest(lm, RandomText(), to(tmp_path / "three"), process_index=index, process_count=3)
    assert whole
    assert harvest(lm, RandomText(), to(tmp_path / "spilled", memory="1B"))
    assert tree(tmp_path / "one") == tree(tmp_path / "three") == tree(tmp_path / "spilled")
    assert not list((tmp_path / "one").rglob(".*"))


def test_corpus_that_ends_early_and_corpus_without_text(lm, tmp_path):
    assert harvest(lm, RandomText(150), to(tmp_path / "s"))
    rows = sum(len(s.tokens) - 1 for s in RandomText(150).sequences())
    assert len(ActivationStore.open(tmp_path / "s")) == rows
    with pytest.raises(UserError, match="no text to train on"):
        harvest(lm, RandomText(0), to(tmp_path / "t"))


def test_sinks_are_masked_and_counted(tmp_path):
    lm = tiny_model()
    lm.model.get_input_embeddings().weight.data[7] *= 300
    settings = to(tmp_path / "s", tokens="20000")
    assert harvest(lm, RandomText(), settings)
    store = ActivationStore.open(tmp_path / "s")
    tokens = torch.cat([batch.token for batch in store.rows_in_order(4096)])
    sevens = sum(int((s.tokens[1:] == 7).sum()) for s in RandomText().sequences())
    assert not (tokens == 7).any() and store.attributes["masked"]["rows"]["sink"] == sevens > 50
    rule = SinkRule.from_attributes(store.attributes["masked"])
    prompt = torch.tensor([[3, 7, 5, 9]])
    with lm.capture() as captured:
        lm(prompt)
    large = rule.large(rule.norms({"resid": captured.resid, "mlp_out": captured.mlp_out}))
    assert large is not None and large.tolist() == [[False, True, False, False]]
    # and the model that its transcoders are used with keeps its own output at the same positions
    transcoder = Transcoder(
        TranscoderSettings(features=4), lm.d_model, [0, 1, 2], meta={"masked": store.attributes["masked"]}
    )
    assert ReplacementModel(lm, transcoder).masked_positions(prompt).tolist() == [[True, True, False, False]]


def test_dtype_is_chosen_from_the_sample(tmp_path):
    """float16 where it has room, else bfloat16; said in the store, the same on a second start, and with any process."""
    for scale, expected in ((1.0, "float16"), (1e6, "bfloat16")):
        lm = tiny_model()
        lm.model.get_input_embeddings().weight.data *= scale
        path = tmp_path / expected
        settings = to(path, dtype="auto", sinks="first")
        for index in (1, 0):
            whole = harvest(lm, RandomText(), settings, process_index=index, process_count=2)
        assert (
            whole
            and harvest(lm, RandomText(), settings)
            and harvest(lm, RandomText(), replace(settings, dtype=expected))
        )
        store = ActivationStore.open(path)
        assert store.attributes["dtype"] == expected
        assert store.batch(0, 0, 500).resid.abs().max() <= store.attributes["largest_in_sample"]["resid"] * 1.5
        with pytest.raises(UserError, match=f"holds a store with .*{expected}"):
            harvest(lm, RandomText(), replace(settings, dtype="float32"))


def test_a_row_beyond_what_the_sample_foretold_is_left_out(tmp_path):
    """Not even where no norm is looked at does a later row end the harvest."""
    lm = tiny_model()
    lm.model.get_input_embeddings().weight.data[150] *= 1e9
    late = RandomText()
    corpus = Late(late, 150, 250)
    assert harvest(lm, corpus, to(tmp_path / "s", dtype="auto", sinks="first", sample_tokens=500))
    store = ActivationStore.open(tmp_path / "s")
    assert store.attributes["dtype"] == "float16" and store.attributes["masked"]["rows"]["beyond_range"] > 0


class Late:
    """A text that has one token only after its first documents."""

    name = fingerprint = "late"

    def __init__(self, text: RandomText, token: int, document: int):
        self.text, self.token, self.document = text, token, document

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
        for sequence in self.text.sequences(split, limit_tokens):
            if int(sequence.document[0]) < self.document:
                tokens = torch.where(sequence.tokens == self.token, 3, sequence.tokens)
                sequence = TokenSequence(tokens, sequence.document)
            yield sequence


def test_a_store_without_a_finished_window_blocks_no_retry(lm, tmp_path, monkeypatch):
    """A harvest that failed in its first window leaves nothing that other settings would have to be afraid of."""
    with monkeypatch.context() as patch:
        patch.setattr(window.Window, "append", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            harvest(lm, RandomText(), to(tmp_path / "s", memory="1B"))
    assert (tmp_path / "s" / ".progress" / "sample.json").is_file()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    assert harvest(lm, RandomText(), to(tmp_path / "s", dtype="bfloat16", tokens="5000"))
    assert harvest(lm, RandomText(), to(tmp_path / "t", dtype="bfloat16", tokens="5000"))
    (tmp_path / "s" / "notes.txt").unlink()
    assert tree(tmp_path / "s") == tree(tmp_path / "t")
    with pytest.raises(UserError, match="choose another path, or remove that store"):
        harvest(lm, RandomText(), to(tmp_path / "s", dtype="float16"))


def test_parts_of_a_model(lm, tmp_path):
    assert harvest(lm, RandomText(), to(tmp_path / "s", layers=[-1], sites=["mlp_out"], fraction=0.5, tokens="20000"))
    store = ActivationStore.open(tmp_path / "s")
    assert store.layers == [2] and store.sites == ("mlp_out",) and store.batch(0, 0, 8).y.shape == (8, 1, 32)
    everything = sum(len(s.tokens) - 1 for s in RandomText().sequences())
    assert abs(len(store) / everything - 0.5) < 0.02
    with pytest.raises(UserError, match="holds mlp_out and not resid"):
        ActivationStore.open(tmp_path / "s", sites=["resid", "mlp_out"])
    with pytest.raises(SettingsError, match="layer 9 of a model of 3 layers"):
        harvest(lm, RandomText(), to(tmp_path / "t", layers=[9]))


def test_int8_and_a_url(lm, tmp_path):
    path = f"local://{tmp_path}/s"
    assert harvest(lm, RandomText(), replace(SETTINGS, path=path, dtype="int8", memory="1B"))
    assert harvest(lm, RandomText(), to(tmp_path / "t"))
    small, exact = ActivationStore.open(path), ActivationStore.open(tmp_path / "t")
    a, b = small.batch(0, 3, 500), exact.batch(0, 3, 500)
    assert torch.equal(a.token, b.token)
    assert (a.resid - b.resid).square().mean() < 1e-4 * b.resid.square().mean()


def test_progress_counts_all_windows_as_one_whole(lm, tmp_path):
    told: dict[str, list[tuple[float, float | None]]] = {}
    settings = to(tmp_path / "s")
    harvest(
        lm,
        RandomText(),
        settings,
        lambda label, done, total=None, note="": told.setdefault(label, []).append((done, total)),
    )
    for label, rows in (
        ("caching activations", settings.train_rows),
        ("caching held-out activations", settings.held_out_rows),
    ):
        done = [at for at, _ in told[label]]
        assert done == sorted(done) and done[-1] == rows and {total for _, total in told[label]} == {rows}
    assert settings.train_rows > 2 * settings.shuffle_rows, "several windows"


def test_says_what_it_will_weigh(lm, tmp_path, monkeypatch):
    notes = []
    harvest(lm, RandomText(), to(tmp_path / "s"), lambda label, done, total=None, note="": notes.append(note))
    assert re.match(r"the store will weigh 7\.\d+ MB, .* are free", notes[0])
    size = weigh(Harvester(lm, RandomText(), to(tmp_path / "s")).layout, to(tmp_path / "s")).store
    there = sum(file.stat().st_size for file in (tmp_path / "s").rglob("c/**/*") if file.is_file())
    assert size <= there < 1.01 * size  # statistics lie there, too
    monkeypatch.setattr("crosslace.data.layout.place.Place.free", lambda self: 1_000_000)
    with pytest.raises(UserError, match=r"would weigh 7\.\d+ MB.* has room for 1(\.\d+)? MB: lower store.tokens"):
        harvest(lm, RandomText(), to(tmp_path / "t"))


@pytest.mark.parametrize("spilled", [False, True])
def test_full_disk_ends_with_a_sentence_and_goes_on(lm, tmp_path, monkeypatch, spilled):
    """What the system says, and what zarrs makes of it; the next test has a real disk."""
    assert harvest(lm, RandomText(), to(tmp_path / "whole"))
    settings = to(tmp_path / "s", memory="1B" if spilled else "auto")
    words = "No space left on device"
    for failure in (OSError(errno.ENOSPC, words), RuntimeError(f"{words} (os error 28)")):
        calls, write = [0], shards.ShardWriter.write

        def fill_up(self, *args, calls=calls, failure=failure, write=write):
            calls[0] += 1
            if calls[0] > 2:
                raise failure
            write(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(shards.ShardWriter, "write", fill_up)
            with pytest.raises(UserError, match=r"no room is left for .* with the same settings"):
                harvest(lm, RandomText(), settings)
        with pytest.raises(UserError, match="is incomplete: run `crosslace cache`"):
            ActivationStore.open(tmp_path / "s")
    assert harvest(lm, RandomText(), settings)
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


class SmallDisk:
    """A file system of a few MB."""

    def __init__(self, path: Path):
        self.path = path

    def mount(self, size: str, *options: str) -> bool:
        given = ",".join([*options, f"size={size}"])
        command = ["mount", "-t", "tmpfs", "-o", given, "tmpfs", str(self.path)]
        return shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    small = SmallDisk(tmp_path / "disk")
    if not os.environ.get("CROSSLACE_MOUNT"):
        pytest.skip("mounts a file system: only with CROSSLACE_MOUNT=1")
    small.path.mkdir()
    if not small.mount("6m"):
        pytest.skip("may not mount a file system")
    yield small
    subprocess.run(["umount", "--lazy", str(small.path)], check=True)


@pytest.mark.parametrize("spilled", [False, True])
def test_a_disk_that_is_really_full(lm, tmp_path, disk, spilled):
    settings = to(disk.path / "s", memory="1B" if spilled else "auto")
    with pytest.raises(UserError, match=r"would weigh 7\.\d+ MB.* has room for [56]\.\d+ MB"):
        harvest(lm, RandomText(), settings)
    assert not list(disk.path.rglob("c/**/*"))

    disk.mount("32m", "remount")
    ballast = disk.path / "ballast"

    def fill_up(label, done, total=None, note=""):
        if note == "window 2" and not ballast.exists():
            with suppress(OSError), ballast.open("wb", buffering=0) as out:
                while out.write(bytes(1 << 16)):
                    pass

    with pytest.raises(UserError, match=r"no room is left for .* with the same settings"):
        harvest(lm, RandomText(), settings, fill_up)
    assert ballast.exists()
    with pytest.raises(UserError, match="is incomplete: run `crosslace cache`"):
        ActivationStore.open(disk.path / "s")

    disk.mount("64m", "remount")
    assert harvest(lm, RandomText(), settings)
    assert harvest(lm, RandomText(), to(tmp_path / "whole"))
    assert tree(disk.path / "s") == tree(tmp_path / "whole")


def test_a_disk_that_is_really_read_only(lm, disk):
    """What is there is read; what would write ends in a sentence."""
    disk.mount("64m", "remount")
    assert harvest(lm, RandomText(), to(disk.path / "s"))
    disk.mount("64m", "remount,ro")
    ActivationStore.open(disk.path / "s").verify()
    for settings in (to(disk.path / "s", tokens="12000"), to(disk.path / "t")):
        with pytest.raises(UserError, match=r"cannot be written to .* choose another store\.path"):
            harvest(lm, RandomText(), settings)
    disk.mount("64m", "remount,rw")


def test_other_model_does_not_go_on_with_a_store(lm, tmp_path):
    assert harvest(lm, RandomText(), to(tmp_path / "s"))
    assert harvest(lm, RandomText(), to(tmp_path / "s"))  # nothing left to do
    other = tiny_model()
    other.model.get_input_embeddings().weight.data *= 2
    other = LanguageModel(other.model, None, "other")
    with pytest.raises(UserError, match=r"holds a store with model\.fingerprint="):
        harvest(other, RandomText(), to(tmp_path / "s"))
    with pytest.raises(UserError, match="cache this model's or load that one"):
        ActivationStore.open(tmp_path / "s").check_model(other.fingerprint, "other")


KILLS = """
    import importlib.util, os, random, shutil, signal, sys, time
    import torch
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("harvest_tests", {test!r})
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    os.fsync = lambda descriptor: None  # what a killed process has written stays; only a power cut would take it
    lm, settings = tests.tiny_model(), tests.to(tests.Path({path!r}), memory={memory!r})

    def run(ends_at=None, index=0, count=1):
        child = os.fork()
        if child:
            return child
        if ends_at is not None:
            left, replace = [ends_at], os.replace

            def counted(*names):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                replace(*names)

            os.replace = counted
        tests.harvest(lm, tests.RandomText(), settings, process_index=index, process_count=count)
        os._exit(0)

    random.seed(0)
    killed = 0
    while killed < {kills}:
        if killed % 2:
            child = run()
            time.sleep(random.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
        else:
            child = run(ends_at=random.randrange(20))  # in the instant before a file takes its name
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            killed += 1
        else:
            shutil.rmtree({path!r})  # it came to its end: the next one begins anew
    last = [run(index=index, count={processes}) for index in range({processes})]
    assert all(os.waitpid(child, 0)[1] == 0 for child in last)
"""


@pytest.mark.parametrize(("memory", "processes"), [("auto", 1), ("1B", 1), ("1B", 2)])
def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(lm, tmp_path, memory, processes):
    kills = 20 if memory == "1B" and processes == 1 else 8
    options = {"memory": memory, "kills": kills, "processes": processes}
    script = KILLS.format(test=__file__, path=str(tmp_path / "s"), **options)
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    torch.set_num_threads(1)
    assert harvest(lm, RandomText(), to(tmp_path / "whole"))
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def test_settings_refuse_nonsense():
    for name, value in {
        "layers": [],
        "dtype": "float8",
        "mode": "ram",
        "tokens": "many",
        "sites": ["attn"],
        "fraction": 0.0,
    }.items():
        with pytest.raises(SettingsError, match=f"store.{name}"):
            replace(SETTINGS, **{name: value})
