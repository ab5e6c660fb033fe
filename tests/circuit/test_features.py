"""Dashboards: every figure against a plain recount, on a random model; the files; labels."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from crosslace.circuit.features import gather
from crosslace.circuit.features.concepts import ConceptCounter, concept_groups, label_by_prompts, score_concepts
from crosslace.circuit.features.dashboards import (
    DashboardReader,
    DashboardWriter,
    feature_number,
    from_feature_number,
    pack,
)
from crosslace.circuit.features.examples import BINS, Histogram
from crosslace.circuit.features.gather import (
    FeatureSettings,
    build_features,
    direct_logits,
    gather_examples,
    layer_records,
)
from crosslace.circuit.features.labels import Label, Labels, label_from_record
from crosslace.circuit.features.sizing import dashboards_take
from crosslace.circuit.model import ReplacementModel
from crosslace.data.errors import SettingsError, UserError
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder
from jsonschema import Draft7Validator

SCHEMA = Path(__file__).parents[1] / "interop" / "neuronpedia-feature-schema.json"
F = 12


class Texts:
    """A corpus of given texts."""

    def __init__(self, texts):
        self.texts = texts

    def sequences(self, split="train", limit_tokens=None):
        class Sequence:
            def __init__(self, tokens):
                self.tokens = tokens

        return (Sequence(text) for text in self.texts)


@pytest.fixture(scope="module")
def model(make_tiny) -> ReplacementModel:
    lm = make_tiny("llama", torch.float64)
    settings = TranscoderSettings(features=F, reach="all", activation="jumprelu", theta_init=0.4)
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=3, dtype=torch.float64)
    with torch.no_grad():
        transcoder.b_enc[1][5] = -1e6  # dead
    return ReplacementModel(lm, transcoder)


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 14, (40,), generator=random).tolist()
    found = [torch.randint(3, 32, (length,), generator=random) for length in lengths]
    return [*found, found[0].clone()]  # one text twice


def plain_activations(model, texts):
    """[tokens] of (text, position, acts [L][F]), one text at a time, without the first position."""
    for number, text in enumerate(texts):
        acts = model.activations(text)
        for position in range(len(text)):
            if not bool(model.masked_positions(text[None])[0, position]):
                yield number, position, [acts_TF[position] for acts_TF in acts]


def test_every_figure_against_a_plain_recount(model, texts, tmp_path):
    settings = FeatureSettings(top=4, quantiles=2, per_quantile=3, before=3, after=2, logits=5)
    folder = build_features(model, Texts(texts), tmp_path, settings)
    unique = texts[:-1]
    unique = [t for i, t in enumerate(unique) if not any(torch.equal(t, other) for other in unique[:i])]
    found = list(plain_activations(model, unique))
    reader, schema = DashboardReader(folder), Draft7Validator(json.loads(SCHEMA.read_text()))
    for layer in range(model.lm.n_layers):
        for feature in range(F):
            record = reader.record(layer, feature)
            schema.validate(record)
            values = [(float(acts[layer][feature]), number, position) for number, position, acts in found]
            active = [value for value, _, _ in values if value > 0]
            assert record["index"] == feature
            assert record["activation_frequency"] == pytest.approx(len(active) / len(values))
            assert sum(record["histogram"]) == len(active)
            if not active:
                assert record["examples_quantiles"] == [] and record["top_logits"] == []
                continue
            assert record["act_max"] == pytest.approx(max(active), rel=1e-3)
            assert record["act_min"] == pytest.approx(min(active), rel=1e-3)
            check_neighbours(model.transcoder, [acts for _, _, acts in found], layer, feature, record)
            best: dict[int, float] = {}
            for value, number, _ in values:
                best[number] = max(best.get(number, 0.0), value)
            expected = sorted((value for value in best.values() if value > 0), reverse=True)[:4]
            top = record["examples_quantiles"][0]["examples"]
            assert [peak(example) for example in top] == pytest.approx(expected, rel=1e-3)
            for group in record["examples_quantiles"]:
                for example in group["examples"]:
                    check_example(model, unique, layer, feature, example)
    assert reader.record(1, 5)["activation_frequency"] == 0


def check_neighbours(transcoder, acts, layer, feature, record):
    """`inputs` and `outputs`: TWERA over the text's tokens that count, the strongest first."""
    for side in ("inputs", "outputs"):
        sizes = [abs(twera) for _, _, twera, _ in record[side]]
        assert sizes == sorted(sizes, reverse=True)
        for other, number, twera, virtual in record[side]:
            (j, a), (i, b) = sorted([(layer, feature), (other, number)])
            source, target = (torch.stack([one[l][f] for one in acts]) for l, f in ((j, a), (i, b)))
            written = transcoder.W_dec[j][a, : i - j].sum(0)
            assert virtual == pytest.approx(float(written @ transcoder.W_enc[i][b]), rel=2e-3)
            assert twera == pytest.approx(float(source @ target / source.sum()) * virtual, rel=2e-3)


def peak(example):
    return example["tokens_acts_list"][example["train_token_ind"]]


def check_example(model, texts, layer, feature, example):
    """The window is a piece of a text, with that text's activations, at most 3 before and 2 after."""
    at, tokens = example["train_token_ind"], [int(token) for token in example["tokens"]]
    assert at <= 3 and len(tokens) - at - 1 <= 2 and example["tokens_acts_list"][at] > 0
    for text in texts:
        for start in range(len(text) - len(tokens) + 1):
            if text[start : start + len(tokens)].tolist() == tokens:
                acts = model.activations(text)[layer][start : start + len(tokens), feature]
                if torch.allclose(acts, torch.tensor(example["tokens_acts_list"]).double(), rtol=1e-3, atol=1e-6):
                    return
    raise AssertionError("an example is no piece of any text")


def test_the_batch_size_changes_nothing(model, texts, tmp_path, monkeypatch):
    settings = FeatureSettings(top=4, quantiles=0, before=3, after=2)
    first = DashboardReader(build_features(model, Texts(texts), tmp_path / "a", settings))
    monkeypatch.setattr("crosslace.circuit.features.gather.LARGEST_BATCH", 200)
    second = DashboardReader(build_features(model, Texts(texts), tmp_path / "b", settings))
    for layer in range(model.lm.n_layers):
        for one, other in zip(first.layer(layer), second.layer(layer), strict=True):
            assert one["activation_frequency"] == other["activation_frequency"]
            # texts that begin alike may tie, and either may be shown
            for a, b in zip(one["examples_quantiles"], other["examples_quantiles"], strict=True):
                assert [peak(example) for example in a["examples"]] == [peak(example) for example in b["examples"]]


def test_direct_logits_are_the_linear_effect_on_the_logits(model):
    """Against the model's own last norm with its denominator frozen."""
    lm, transcoder = model.lm, model.transcoder
    x = torch.randn(lm.d_model, dtype=torch.float64)
    scale = lm.final_norm.denominator(x)
    for layer in range(lm.n_layers):
        written = transcoder.W_dec[layer][7].sum(0)
        effect = (lm.final_norm.frozen(x + written, scale) - lm.final_norm.frozen(x, scale)) @ lm.W_U.T * scale
        found = direct_logits(lm, transcoder, layer, torch.tensor([7]))[0]
        torch.testing.assert_close(found, effect - effect.mean())


def test_histograms_double_their_range_and_lose_nothing():
    values = torch.tensor([0.5, 1.0, 3.0, 40.0, 0.1, 0.1])
    histogram = Histogram(2, "cpu")
    for value in values:
        histogram.update(torch.tensor([1]), value[None])
    assert int(histogram.counts[1].sum()) == 6 and not histogram.counts[0].any()
    edges = torch.arange(BINS + 1) / BINS * histogram.limit[1]
    expected = torch.histogram(values, edges).hist.long()
    assert torch.equal(histogram.counts[1], expected)
    low, high = histogram.quantiles([0.0, 1.0])[1].tolist()
    assert low == pytest.approx(0.1) and high == pytest.approx(40.0)
    assert histogram.quantiles([0.5])[0].tolist() == [0.0]


def test_records_lie_where_the_index_says(tmp_path):
    writer = DashboardWriter(tmp_path, 3)
    writer.write_layer(2, [{"index": i, "text": "é" * i} for i in range(5)])
    writer.close()
    reader = DashboardReader(tmp_path)
    assert reader.features == [0, 0, 5]
    assert reader.record(2, 4) == {"index": 4, "text": "éééé"}
    for layer, feature in ((0, 0), (3, 0), (2, 5), (2, -1)):
        with pytest.raises(UserError, match="no dashboard"):
            reader.record(layer, feature)
    assert reader.unpack(tmp_path / "each") == 5
    assert json.loads((tmp_path / "each" / f"{feature_number(2, 3)}.json").read_text())["text"] == "ééé"
    packed = bytearray((tmp_path / "layer_2.bin").read_bytes())
    packed[10] ^= 255
    (tmp_path / "layer_2.bin").write_bytes(packed)
    with pytest.raises(UserError, match="damaged at feature 0"):
        reader.record(2, 0)


def test_feature_json_goes_out_and_comes_back(model, texts, tmp_path):
    folder = build_features(model, Texts(texts), tmp_path / "run", FeatureSettings(top=3))
    count = DashboardReader(folder).unpack(tmp_path / "each")
    assert pack(tmp_path / "each", tmp_path / "back") == count
    first, second = DashboardReader(folder), DashboardReader(tmp_path / "back")
    assert [list(first.layer(l)) for l in range(model.lm.n_layers)] == [
        list(second.layer(l)) for l in range(model.lm.n_layers)
    ]


def test_foreign_feature_json_is_filled_up_and_what_is_none_is_refused(tmp_path):
    example = {"tokens": ["a", " b"], "tokens_acts_list": [0, 2.5]}
    path = tmp_path / f"{feature_number(1, 2)}.json"
    path.write_text(json.dumps({"index": 8, "examples_quantiles": [{"quantile_name": "Top", "examples": [example]}]}))
    assert pack(tmp_path, tmp_path / "packed") == 1
    reader = DashboardReader(tmp_path / "packed")
    assert reader.features == [0, 3] and reader.record(1, 0)["examples_quantiles"] == []
    record = reader.record(1, 2)
    assert record["index"] == 2 and (record["act_min"], record["act_max"]) == (2.5, 2.5) and record["top_logits"] == []
    for broken in (
        '{"examples_quantiles": 3}',
        "[]",
        '{"index": 1}',
        "{",
        json.dumps({"examples_quantiles": [{"quantile_name": "Top", "examples": [{**example, "tokens": []}]}]}),
        json.dumps(
            {"examples_quantiles": [{"quantile_name": "Top", "examples": [{**example, "tokens_acts_list": [0, "x"]}]}]}
        ),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match="is no feature JSON"):
            pack(tmp_path, tmp_path / "packed")
    path.rename(tmp_path / "99999999999.json")
    with pytest.raises(UserError, match="no Cantor-paired number"):
        pack(tmp_path, tmp_path / "packed")
    with pytest.raises(UserError, match="holds no feature JSON"):
        pack(tmp_path / "packed", tmp_path / "more")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    import gzip

    for name in ("../secret.bin", "/etc/passwd", "..", "", 3):
        (tmp_path / "index.json.gz").write_bytes(
            gzip.compress(json.dumps([{"filename": name, "offsets": [0, 9]}]).encode())
        )
        with pytest.raises(UserError, match="damaged"):
            DashboardReader(tmp_path)
    with pytest.raises(UserError, match="no feature dashboards"):
        DashboardReader(tmp_path / "none")


@pytest.mark.parametrize(("layer", "feature"), [(0, 0), (3, 310), (25, 2**20), (100, 3_000_000_000)])
def test_feature_numbers_pair_and_part(layer, feature):
    assert from_feature_number(feature_number(layer, feature)) == (layer, feature)


# --- labels ---------------------------------------------------------------------------------------------------


def test_labels_of_a_weaker_source_never_replace_a_stronger(tmp_path):
    labels = Labels()
    labels.set(1, 2, Label("on “Dal”", "tokens"))
    labels.set(1, 2, Label("state: Texas", "truth", 0.97))
    labels.set(1, 2, Label("on “las”", "tokens"))
    labels.save(tmp_path)
    read = Labels.load(tmp_path)
    assert read.get(1, 2) == "state: Texas" and read.get(0, 0) is None
    read.set(1, 2, Label("mine"))
    assert read.label(1, 2) == Label("mine", "hand")
    (tmp_path / "features" / "labels.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match=r"labels\.json"):
        Labels.load(tmp_path)


def test_a_fallback_label_says_what_fires_it_or_what_it_says():
    def record(tokens, logits):
        examples = [{"tokens": [" a", token], "tokens_acts_list": [0.0, 2.0]} for token in tokens]
        return {"examples_quantiles": [{"quantile_name": "", "examples": examples}], "top_logits": logits}

    label = label_from_record(record([" Dal", " Dal", " Hou"], [" x"]))
    assert label is not None and label.text == "on “Dal”, “Hou”" and label.source == "tokens"
    label = label_from_record(record([f" t{i}" for i in range(9)], [" Austin", "\n", " Ohio"]))
    assert label is not None and label.text.startswith("says “Austin”")
    assert label_from_record({"examples_quantiles": [], "top_logits": []}) is None


def test_f1_against_a_plain_count():
    random = torch.Generator().manual_seed(0)
    acts, holds = torch.rand(200, 5, generator=random) - 0.5, torch.rand(200, 3, generator=random) > 0.7
    counter = ConceptCounter(5, 3)
    for part in range(0, 200, 64):
        counter.update(acts[part : part + 64], holds[part : part + 64])
    scores = counter.scores()
    for f in range(5):
        for c in range(3):
            fires, held = acts[:, f] > 0, holds[:, c]
            hit = int((fires & held).sum())
            precision, recall = hit / int(fires.sum()), hit / int(held.sum())
            assert float(scores.f1[f, c]) == pytest.approx(2 * precision * recall / (precision + recall))
            assert float(scores.precision[f, c]) == pytest.approx(precision)
            assert float(scores.recall[f, c]) == pytest.approx(recall)


def test_a_planted_detector_is_named(model, texts):
    """Concepts that hold exactly where a feature fires, or at more tokens but for the last ones, are found with F1 1;
    one that holds at last tokens alone is not what a feature means that fires elsewhere too."""
    prompts, number = [], itertools.count()
    for text in texts:
        acts = model.activations(text)
        held = [["everywhere"] if bool(acts[0][t, 3] > 0) else [] for t in range(len(text))]
        for concepts in filter(None, held):
            concepts.append(f"part {next(number) % 2}")
        for t in range(len(text)):
            if bool(acts[2][t, 4] > 0) or (t < len(text) - 1 and t % 2):
                held[t].append("worked out at the end")
        if bool(acts[2][-1, 5] > 0):
            held[-1].append("at the end")
        prompts.append((text, held))
    result = score_concepts(model, prompts)
    assert result.detectors("everywhere")[0] == (0, 3, 1.0)
    assert (2, 4, 1.0) in result.detectors("worked out at the end")
    fired = [acts[2][:, 5] > 0 for acts in map(model.activations, texts[::2])]
    precision = sum(bool(one[-1]) for one in fired) / sum(int(one.sum()) for one in fired)
    c = result.concepts.index("at the end")
    assert float(result.scores[2].f1[5, c]) == pytest.approx(2 * precision / (1 + precision))
    label = label_by_prompts(model, prompts, least_f1=0.2).label(0, 3)
    assert label is not None and label.text == "everywhere"
    assert set(label.also) >= {"part 0", "part 1"} and all(f1 < 1 for f1 in label.also.values())
    with pytest.raises(UserError, match="one list a token"):
        score_concepts(model, [(texts[0], [["x"]] * (len(texts[0]) + 1))])
    with pytest.raises(UserError, match="no concept"):
        score_concepts(model, [])


def test_the_f1_that_is_told_is_of_prompts_that_did_not_choose(model, texts):
    """A concept that a feature detects on every second prompt alone, by the wrong half's accident, is not believed."""
    prompts = []
    for number, text in enumerate(texts):
        fires = model.activations(text)[0][:, 3] > 0
        holds = fires if number % 2 == 0 else ~fires
        prompts.append((text, [["lucky"] if bool(held) else [] for held in holds]))
    result = score_concepts(model, prompts)
    label = result.labels().label(0, 3)
    assert float(result.scores[0].f1[3, 0]) == 1.0
    assert label is not None and label.text == "lucky" and label.f1 == 0.0


def test_a_concept_of_two_features_is_found_as_their_group(model, texts):
    """Two features, each of which fires where the other does not; neither alone is the concept."""
    fires = [model.activations(text)[0] > 0 for text in texts]
    halves = [torch.cat(fires[half::2]) for half in (0, 1)]
    alone = lambda a, b: min(int((half[:, a] & ~half[:, b]).sum()) for half in halves)
    a, b = max(((a, b) for a in range(F) for b in range(a)), key=lambda pair: min(alone(*pair), alone(*pair[::-1])))
    assert min(alone(a, b), alone(b, a)) > 0
    prompts = [
        (text, [["either"] if bool(x) else [] for x in fires_TF[:, a] | fires_TF[:, b]])
        for text, fires_TF in zip(texts, fires)
    ]
    (group,) = concept_groups(model, prompts, most=40)
    assert group.f1 == 1.0 > group.best_alone and {(0, a), (0, b)} <= set(group.members)


def test_what_dashboards_take_is_what_they_took(model, texts, tmp_path):
    settings = FeatureSettings(top=5, quantiles=2, per_quantile=3, before=4, after=2, neighbours=3)
    sizes = [F] * model.lm.n_layers
    taken = dashboards_take(sizes, model.lm.d_model, settings)
    kept = gather_examples(model, Texts(texts).sequences(), range(model.lm.n_layers), settings, [])
    tensors = [
        tensor
        for layer in kept.values()
        for part in (layer, layer.top, layer.sampled, layer.histogram)
        for tensor in vars(part).values()
        if isinstance(tensor, torch.Tensor) and len(tensor) == F
    ]
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert taken.memory == pytest.approx(own, rel=0.05)
    folder = build_features(model, Texts(texts), tmp_path, settings)
    written = sum(path.stat().st_size for path in folder.glob("layer_*.bin"))
    assert written / 4 < taken.disk < 4 * written
    shared = dashboards_take(sizes, model.lm.d_model, settings, processes=3)
    assert shared.memory == taken.memory / 3 and shared.writing == pytest.approx(taken.writing / 3)


# --- bad input ------------------------------------------------------------------------------------------------


def test_bad_settings_and_texts_are_refused(model, tmp_path):
    with pytest.raises(SettingsError, match=r"features\.top=0"):
        FeatureSettings(top=0)
    with pytest.raises(UserError, match=r"features\.layers names \[9\]"):
        build_features(model, Texts([]), tmp_path, FeatureSettings(layers=[9]))
    with pytest.raises(UserError, match="no text"):
        build_features(model, Texts([]), tmp_path)


def test_build_keeps_labels_and_adds_guesses(model, texts, tmp_path):
    labels = Labels({(0, 3): Label("mine", "hand")})
    labels.save(tmp_path)
    build_features(model, Texts(texts), tmp_path, FeatureSettings(layers=[0]))
    read = Labels.load(tmp_path)
    assert read.get(0, 3) == "mine" and len(read) > 1
    assert DashboardReader(tmp_path / "features").features == [F, 0, 0]


def test_what_was_stopped_goes_on_with_the_layers_that_are_missing(model, texts, tmp_path, monkeypatch):
    settings = FeatureSettings(top=3, layers_at_once=1)
    whole = build_features(model, Texts(texts), tmp_path / "whole", settings)
    done = []

    def stop(model, layer, *more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(layer)
        return layer_records(model, layer, *more)

    monkeypatch.setattr(gather, "layer_records", stop)
    with pytest.raises(KeyboardInterrupt):
        build_features(model, Texts(texts), tmp_path / "stopped", settings)
    with pytest.raises(UserError, match="no feature dashboards"):
        DashboardReader(tmp_path / "stopped" / "features")
    done.clear()
    stopped = build_features(model, Texts(texts), tmp_path / "stopped", settings)
    assert done == [2], "two layers were there"
    files = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files(stopped) == files(whole)
