"""Labels by machine: evidence against a recount, scores on made-up features, judges that misbehave, controls."""

import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from crosslace.circuit.features import Label, Labels
from crosslace.circuit.labelling import (
    AnswerFile,
    Budget,
    EndpointJudge,
    LabelSettings,
    LocalJudge,
    View,
    against_truth,
    explain_by_judge,
    explain_by_tokens,
    load_prompts,
    read_explanations,
    study,
    write_explanations,
)
from crosslace.circuit.labelling.controls import shuffled
from crosslace.circuit.labelling.evidence import Evidence, EvidenceSettings, Window, collect
from crosslace.circuit.labelling.explain import fill, label_of_answer, marked
from crosslace.circuit.labelling.scoring import (
    Question,
    ask,
    balanced,
    detection,
    fuzzing,
    rank_correlation,
    simulated,
    verdict,
)
from crosslace.circuit.model import ReplacementModel
from crosslace.data.errors import UserError
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

V = 32
WORDS = [f" w{i}" for i in range(V)]


def words(tokens):
    return [WORDS[int(token)] for token in tokens]


class Texts:
    """A corpus with other texts in each part."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(8, 14, (120,), generator=draw).tolist()
        self.texts = [torch.randint(3, V, (length,), generator=draw) for length in lengths]

    def sequences(self, split="train", limit_tokens=None):
        class Sequence:
            def __init__(self, tokens):
                self.tokens = tokens

        return (Sequence(text) for text in (self.texts[:80] if split == "train" else self.texts[80:]))


class Tokenizer:
    bos_token_id = None

    def encode(self, text, add_special_tokens=False):
        return [WORDS.index(text)] if text in WORDS else [0, 1]


@pytest.fixture(scope="module")
def view(make_tiny):
    lm = make_tiny("llama", torch.float64)
    settings = TranscoderSettings(features=10, reach="1", activation="jumprelu", theta_init=1.5)
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=3, dtype=torch.float64)
    with torch.no_grad():
        transcoder.b_enc[0][4] = -1e6  # dead
        for l in range(lm.n_layers):
            transcoder.b_enc[l] += 1.0
    model = ReplacementModel(lm, transcoder)
    return View(model), model


def test_evidence_against_a_recount(view):
    """Positives fire where they say, negatives fire nowhere, and no window of one end is a text of the other."""
    view, model = view
    corpus = Texts()
    found = collect(view, corpus, view.transcoder.layers, EvidenceSettings(10_000, 10_000, before=3, after=2, pool=60))
    train, held = ([tuple(t.tolist()) for t in part] for part in (corpus.texts[:80], corpus.texts[80:]))
    seen = 0
    for layer in view.transcoder.layers:
        for feature in range(10):
            e = found.of(layer, feature)
            for window, texts in [(w, train) for w in e.strongest + e.uniform] + [(w, held) for w in e.positives]:
                assert window.acts[window.at] > 0
                assert any(pieces(text, window.tokens) for text in texts)
            for window in e.negatives:
                homes = [text for text in held if pieces(text, window.tokens)]
                assert homes
                fired = [
                    model.activations(torch.tensor(text))[layer][start : start + len(window.tokens), feature].max()
                    for text in homes
                    for start in pieces(text, window.tokens)
                ]
                assert min(float(x) for x in fired) == 0
                seen += 1
    assert seen > 20
    dead = found.of(0, 4)
    assert dead.strongest == dead.positives == []


def pieces(text, window):
    n = len(window)
    return [i for i in range(len(text) - n + 1) if list(text[i : i + n]) == list(window)]


# --- statistics with known answers ------------------------------------------------------------------------------


def test_balanced_accuracy_and_its_interval():
    value, low, high = balanced(8, 10, 5, 10)
    assert value == pytest.approx(0.65) and low < 0.65 < high
    assert balanced(10, 10, 10, 10)[0] == 1.0 and balanced(10, 10, 10, 10)[1] < 0.97
    draws = random.Random(0)
    inside = 0
    for _ in range(500):  # the interval holds the truth about 19 times of 20
        hits, rejections = sum(draws.random() < 0.8 for _ in range(12)), sum(draws.random() < 0.6 for _ in range(12))
        _, low, high = balanced(hits, 12, rejections, 12)
        inside += low <= 0.7 <= high
    assert 0.9 <= inside / 500 <= 0.995


def test_simulation_finds_the_words_and_only_those():
    embeddings = torch.eye(V)
    firing = [Window([5, 7, 9], [0.0, 2.0, 0.0], 1)] * 5
    silent = [Window([5, 6, 9], [0.0, 0.0, 0.0], 1)] * 5
    evidence = Evidence(0, 0, [], [], firing, silent)
    right, wrong, none = (simulated(evidence, tokens, embeddings) for tokens in ([7], [5], []))
    assert right is not None and right.area == 1.0 and right.correlation == pytest.approx(1.0)
    assert wrong is not None and wrong.area == 0.5 and wrong.correlation < 0
    assert none is not None and (none.area, none.correlation) == (0.5, 0.0)
    assert simulated(evidence._replace(positives=firing[:2]), [7], embeddings) is None


def test_ranks_with_ties():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 2], [5, 5, 9, 9]) == pytest.approx(1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    labels = {(0, f): Label("x", "truth", f / 20) for f in range(20)}
    truth = against_truth(labels, {key: key[1] ** 2 for key in labels})
    assert truth is not None and truth["spearman"] == pytest.approx(1) and truth["features"] == 20


def test_answers_are_read_as_they_come():
    assert [verdict(a) for a in ("Yes.", " no", "1", "It does: yes!", "yes or no", "maybe", "")] == [
        True, False, True, True, None, None, None,
    ]  # fmt: skip
    label = label_of_answer('\n**Label: "names of states"**\nbecause ...')
    assert label is not None and label.text == "names of states" and label.source == "model"
    assert label_of_answer("...\n") is None and label_of_answer(None) is None
    assert fill("{a} {b} {c}", a="{b}", b="x") == "{b} x {c}"
    assert marked(Window([4, 5, 6], [0.0, 1.0, 0.0], 1), words) == "w4<< w5>> w6"


# --- judges ---------------------------------------------------------------------------------------------------


class Knowing:
    """A judge that knows the rule: the feature fires on w7."""

    name = "knowing"

    def ask(self, prompts):
        for prompt in prompts:
            if "marked with" in prompt:
                yield "yes" if "<< w7>>" in prompt else "no"
            elif "fire anywhere" in prompt:
                yield "yes" if " w7" in prompt.split("this text?")[1] else "no"
            else:
                yield "on w7"


class Babbling(Knowing):
    name = "babbling"

    def ask(self, prompts):
        yield from ("perhaps" for _ in prompts)


def made_up():
    firing = [Window([5, 7, 9 + i], [0.0, 2.0, 0.0], 1) for i in range(6)]
    silent = [Window([5, 6, 9 + i], [0.0, 0.0, 0.0], 1) for i in range(6)]
    return Evidence(0, 3, firing, [], firing, silent)


def test_a_judge_that_knows_scores_one_and_one_that_babbles_is_counted():
    evidence, prompts, label = made_up(), load_prompts(), Label("on w7", "model")
    for made in (detection(evidence, label, prompts, words), fuzzing(evidence, label, prompts, words)):
        assert {q.truth for q in made} == {True, False}
        right = ask(Knowing(), made)[0, 3]
        assert right.balanced_accuracy == 1.0 and right.nonsense == 0
        lost = ask(Babbling(), made)[0, 3]
        assert lost.balanced_accuracy == 0.0 and lost.nonsense == len(made)


def test_a_whole_study_with_its_controls(view):
    view, _ = view
    view.lm.tokenizer, before = Tokenizer(), view.lm.tokenizer
    try:
        settings = LabelSettings(tokens=10_000, held_out=10_000)
        found = study(view, Texts(), settings, explain_by_tokens(words), words)
        judged = study(
            view, Texts(), LabelSettings(tokens=10_000, held_out=10_000, features=3, controls=False),
            explain_by_judge(Knowing(), load_prompts(), words), words, Knowing(), load_prompts(),
        )  # fmt: skip
    finally:
        view.lm.tokenizer = before
    assert [row.name for row in found.table] == ["transcoder", "labels shuffled", "random", "neurons"]
    assert (0, 4) not in found.labels  # a dead feature gets no name
    ours, dealt = found.table[:2]
    assert ours.simulation is not None and dealt.simulation is not None and ours.simulation > dealt.simulation + 0.05
    assert "simulation" in found.share_by_chance()
    assert {label.text for label in judged.labels.values()} == {"on w7"} and judged.detections
    assert max([key[0] for key in judged.labels].count(layer) for layer in (0, 1)) <= 3


def test_shuffled_labels_stay_with_nobody():
    labels = {(layer, f): Label(f"{layer} {f}") for layer in range(2) for f in range(7)}
    dealt = shuffled(labels)
    assert dealt.keys() == labels.keys()
    assert all(dealt[key].text != labels[key].text and dealt[key].text[0] == str(key[0]) for key in labels)
    assert sorted(label.text for label in dealt.values()) == sorted(label.text for label in labels.values())


def test_templates_of_ones_own(tmp_path):
    (tmp_path / "detect.txt").write_text("Is {label} in {text}? yes or no")
    assert load_prompts(tmp_path).detect.startswith("Is {label}") and "name" in load_prompts(tmp_path).explain
    (tmp_path / "fuzz.txt").write_text("the same for all")
    with pytest.raises(UserError, match="same question"):
        load_prompts(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        load_prompts(tmp_path / "none")


# --- an endpoint on loopback that misbehaves -----------------------------------------------------------------


class StubServer(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Stub)
        self.lock, self.seen = threading.Lock(), []


class Stub(BaseHTTPRequestHandler):
    """Each prompt's first word says what to do with it the first time; then it answers."""

    server: StubServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            self.server.seen.append((prompt, self.headers.get("Authorization")))
            first = [p for p, _ in self.server.seen].count(prompt) == 1
        what = prompt.split()[0]
        if what == "slow" and first:
            time.sleep(1.5)
        if what in ("429", "500", "401") and (first or what == "401"):
            self.send_response(int(what))
            self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        answer = {"choices": [{"message": {"content": prompt.split()[-1]}}], "usage": usage}
        data = json.dumps({"choices": []} if what == "odd" else answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if what == "half" and first else data)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-key")
    server = StubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_that_misbehaves(endpoint, tmp_path):
    server, url = endpoint
    answers = AnswerFile(tmp_path / "answers.jsonl")
    judge = EndpointJudge(url, "some-model", "SOME_KEY", answers, Budget(), timeout=1.0)
    hostile = "fine <script>alert(1)</script>{label}"
    prompts = ["fine a", "429 b", "500 c", "slow d", "half e", "odd f", "401 g", hostile]
    assert list(judge.ask(prompts)) == ["a", "b", "c", "d", "e", None, None, hostile.split()[-1]]
    assert judge.failures == {"an answer that is not of the protocol": 1, "HTTP 401": 1}
    assert {key for _, key in server.seen} == {"Bearer secret-key"}
    assert "secret-key" not in (tmp_path / "answers.jsonl").read_text()
    # A second run asks again only for what has no answer.
    asked = len(server.seen)
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"key": "cut o')
    again = EndpointJudge(url, "some-model", "SOME_KEY", AnswerFile(tmp_path / "answers.jsonl"), Budget())
    assert list(again.ask(prompts[:5])) == ["a", "b", "c", "d", "e"] and len(server.seen) == asked
    assert list(again.ask(["fine new"])) == ["new"]
    new = AnswerFile.key("endpoint", again.url, "some-model", "32", "fine new")
    assert AnswerFile(tmp_path / "answers.jsonl").known[new] == "new"


def test_a_budget_is_kept(endpoint):
    server, url = endpoint
    budget = Budget(tokens=200)
    judge = EndpointJudge(url, "m", "SOME_KEY", AnswerFile(None), budget, concurrency=1)
    answers = list(judge.ask([f"fine {i}" for i in range(40)]))
    assert 0 < len(server.seen) < 40 and answers.count(None) == 40 - len(server.seen)
    assert budget.spent_in + budget.spent_out <= 200 and judge.failures["the budget is spent"] == answers.count(None)
    money = Budget(money=30e-6, price_in=1.0, price_out=1.0)
    judge = EndpointJudge(url, "m", "SOME_KEY", AnswerFile(None), money, concurrency=1, longest=4)
    assert None in list(judge.ask([f"fine {i}" for i in range(9)])) and money.spent <= 30e-6


def test_an_endpoint_without_a_key_is_refused(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(UserError, match="NO_KEY"):
        EndpointJudge("http://127.0.0.1:1/v1", "m", "NO_KEY", AnswerFile(None), Budget())
    with pytest.raises(UserError, match="no address"):
        EndpointJudge("127.0.0.1", "m", "", AnswerFile(None), Budget())


class Chat:
    """As much of a chat model's tokenizer as is asked for."""

    chat_template, pad_token_id = None, 0

    def encode(self, text, **_):
        return [3 + ord(c) % (V - 3) for c in text][:20]

    def decode(self, ids, **_):
        return " ".join(str(int(i)) for i in ids)


def test_controls_stand_in_the_table_of_a_local_judge(view, make_tiny):
    view, _ = view
    view.lm.tokenizer, before = Tokenizer(), view.lm.tokenizer
    judge = LocalJudge(make_tiny("llama", torch.float32).model, Chat(), "tiny", AnswerFile(None), longest=3, batch=64)
    try:
        settings = LabelSettings(tokens=10_000, held_out=10_000, features=2)
        explain = explain_by_judge(judge, load_prompts(), words)
        found = study(view, Texts(), settings, explain, words, judge, load_prompts())
    finally:
        view.lm.tokenizer = before
    assert [row.name for row in found.table] == ["transcoder", "labels shuffled", "random", "neurons"]
    for row in found.table:
        assert row.labelled > 0 and row.detection == row.fuzzing == 0.5  # random weights answer one and the same


def test_a_tiny_local_chat_model_answers_the_same_in_any_batch(make_tiny, tmp_path):
    lm = make_tiny("llama", torch.float32)

    prompts = ["one", "a longer question", "x"]
    whole = LocalJudge(lm.model, Chat(), "tiny", AnswerFile(tmp_path / "a.jsonl"), longest=4, batch=3)
    single = LocalJudge(lm.model, Chat(), "tiny", AnswerFile(None), longest=4, batch=1)
    answers = list(whole.ask(prompts))
    assert answers == list(single.ask(prompts)) and all(answer and len(answer.split()) <= 4 for answer in answers)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="no tokenizer"):
        LocalJudge(lm.model, None, "tiny", AnswerFile(None))


def test_questions_without_answers_count_for_nothing():
    class Silent(Knowing):
        def ask(self, prompts):
            yield from (None if i % 2 else a for i, a in enumerate(super().ask(prompts)))

    questions = [
        Question((0, 0), q.prompt, q.truth) for q in detection(made_up(), Label("on w7"), load_prompts(), words)
    ]
    score = ask(Silent(), questions)[0, 0]
    assert score.balanced_accuracy == 1.0 and score.unanswered == 6 and score.positives + score.negatives == 6


# --- explanation records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.jsonl.gz"])
def test_explanation_records_go_out_and_come_back(tmp_path, name):
    labels = Labels(
        {(1, 3): Label("state: Texas", "truth", 0.9), (0, 2): Label("hers", "hand"), (0, 1): Label("x", "tokens")}
    )
    path = write_explanations(labels, tmp_path / name, "some-model", "clt", {(1, 3): {"detection": 0.8}})
    read = read_explanations(path)
    assert {key: label.text for key, label in read.items()} == {(1, 3): "state: Texas", (0, 2): "hers"}
    assert {label.source for _, label in read.items()} == {"model"}
    if name.endswith("l"):
        record = [json.loads(line) for line in path.read_text().splitlines()][1]
        assert (record["layer"], record["index"], record["scores"]) == ("1-clt", "3", {"detection": 0.8, "f1": 0.9})


def test_records_that_are_none_are_refused(tmp_path):
    for number, line in enumerate(("{", '{"layer": "x", "index": 1, "description": "a"}', '{"layer": 1, "index": 1}')):
        path = tmp_path / f"{number}.jsonl"
        path.write_text('{"layer": "2-a", "index": "7", "description": " fine "}\n' + line)
        with pytest.raises(UserError, match="line 2"):
            read_explanations(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_explanations(tmp_path / "none.jsonl")
