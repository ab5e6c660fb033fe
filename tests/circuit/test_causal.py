"""Prompts with answers, and whether the features of a graph's paths are what makes the answer."""

from types import SimpleNamespace

import pytest
import torch
from crosslace.circuit.attribution import trace
from crosslace.circuit.graph import propose_supernodes
from crosslace.circuit.judge import judge_groups
from crosslace.circuit.judge.causal import causal_part, check_swap, matched, path_features, places
from crosslace.circuit.judge.questions import QUESTIONS, SURE, Question, answered, one_of_each
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement import Intervention
from crosslace.data.errors import UserError
from crosslace.data.models.language_model import LanguageModel


class Numbers:
    """A tokenizer of a model without one: `3 17 4` is three tokens."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def rm(make_exact_replacement) -> ReplacementModel:
    exact = make_exact_replacement("gpt2")
    return ReplacementModel(LanguageModel(exact.lm.model, Numbers(), "numbers"), exact.transcoder)


def likeliest(rm: ReplacementModel, prompt: str) -> str:
    return str(int(rm.lm(rm.lm.tokenize(prompt)[None])[0, -1].argmax()))


@pytest.fixture(scope="module")
def asked(rm) -> list[Question]:
    prompts = ("3 0 17 9 9 28 4", "3 0 18 9 9 28 4")
    return [Question("numbers", prompts[i], likeliest(rm, prompts[i]), prompts[1 - i]) for i in (0, 1)]


def test_the_list_is_large_and_its_partners_are_in_it() -> None:
    assert len(QUESTIONS) >= 40 and len({question.prompt for question in QUESTIONS}) == len(QUESTIONS)
    by_prompt = {question.prompt: question for question in QUESTIONS}
    for question in QUESTIONS:
        if question.partner is not None:
            assert by_prompt[question.partner].answer != question.answer
    assert len({question.kind for question in one_of_each(QUESTIONS, 9)}) == 9
    assert one_of_each(QUESTIONS, 500) != list(QUESTIONS) and len(one_of_each(QUESTIONS, 500)) == len(QUESTIONS)


def test_what_the_model_does_not_answer_is_left_out_and_said() -> None:
    """A model that is sure of token 1 after a prompt that ends in 1, and unsure elsewhere."""

    def model(tokens):
        logits = torch.zeros(1, tokens.shape[1], 5)
        logits[0, -1, 1] = 5.0 if int(tokens[0, -1]) == 1 else 1.0
        return logits

    class Model(SimpleNamespace):
        __call__ = staticmethod(model)

    lm = Model(
        tokenizer=Numbers(),
        tokenize=lambda prompt: torch.tensor([int(word) for word in prompt.split()]),
        token_strings=lambda ids: [str(id) for id in ids],
    )
    right, unsure, wrong = Question("a", "2 1", "1"), Question("a", "2 2", "1"), Question("a", "3 1", "4")
    several = Question("a", "4 1", "1 1")
    known, others = answered(lm, [right, unsure, wrong, several])
    assert known == [right] and len(others) == 3
    assert "'2 2' is not answered by '1' but by '1' (0.40): left out" in others[0] and SURE == 0.5
    assert "'3 1' is not answered by '4' but by '1'" in others[1]


def test_matched_features_stand_beside_the_paths_and_are_others(rm, asked) -> None:
    graph = trace(rm, asked[0].prompt)
    ids, words = path_features(graph, int(asked[0].answer))
    others = matched(rm, graph, ids)
    assert ids and others and not set(ids) & set(others) and len(set(others)) == len(others)
    assert words.endswith(graph.logits[0].label) and (words.startswith("L") or " -> L" in words)
    beside = {(layer, position) for layer, position, _ in places(graph, others)}
    assert beside <= {(layer, position) for layer, position, _ in places(graph, ids)}


def test_silencing_is_what_an_intervention_says(rm, asked) -> None:
    graphs = {question.prompt: trace(rm, question.prompt) for question in asked}
    found = causal_part(rm, asked, graphs)
    for question, row in zip(asked, found["silenced"], strict=True):
        graph = graphs[question.prompt]
        ids, _ = path_features(graph, int(question.answer))
        off = [Intervention(*place, times=0.0) for place in places(graph, ids)]
        result = rm.intervene(graph.tokens, off, mode="steer")
        assert row["path"] == pytest.approx(float(result.probabilities()[int(question.answer)]))
        clean = rm.lm(rm.lm.tokenize(question.prompt)[None])[0, -1].softmax(-1)
        assert row["clean"] == pytest.approx(float(clean[int(question.answer)]))
        assert row["features"] == len(ids) and row["matched"] != row["path"]
    assert len(found["swapped"]) == 2
    assert found["left_of_the_answer"]["path"]["mean"] == pytest.approx(
        sum(row["path"] / row["clean"] for row in found["silenced"]) / 2
    )


def test_groups_are_scored_by_what_an_intervention_says(rm, asked) -> None:
    graph = trace(rm, asked[0].prompt)
    groups = propose_supernodes(graph, "edges", alike=0.2)
    assert len(groups) > 1
    found = judge_groups(rm, graph, groups, most=2)
    answer = max(graph.logits, key=lambda logit: logit.probability)

    def left(ids):
        off = [Intervention(*place, times=0.0) for place in places(graph, ids)]
        result = rm.intervene(graph.tokens, off, mode="steer")
        return float(result.probabilities()[answer.token] / result.probabilities(True)[answer.token])

    inside = {id for ids in groups.values() for id in ids}
    others = matched(rm, graph, sorted(inside))
    everything = set(range(graph.n_features))
    assert inside < everything
    expected = [left(ids) for ids in (inside, others, everything - inside, everything - set(others))]
    assert [found.left, found.left_matched, found.kept, found.kept_matched] == pytest.approx(expected)
    for effect in found.effects:
        assert effect.left == pytest.approx(left(groups[effect.name])) and effect.features == len(groups[effect.name])
    influence = graph.influence()
    assert found.effects[0].influence == pytest.approx(
        float(influence[groups[found.effects[0].name]].sum() / influence[: graph.n_features].sum())
    )
    assert found.scores["completeness"] <= found.whole["completeness"] + 1e-6
    named = trace(rm, asked[0].prompt, targets=["L1:0"])
    with pytest.raises(UserError, match="tried out on a next token"):
        judge_groups(rm, named, {"one": [0]})


def test_a_swap_sets_what_the_partner_has(rm, asked) -> None:
    one, two = asked
    graphs = [trace(rm, question.prompt) for question in asked]
    swap = check_swap(rm, one, two, *graphs)
    assert swap is not None
    acts = rm.activations(graphs[1].tokens)
    both = {place for q, g in zip(asked, graphs) for place in places(g, path_features(g, int(q.answer))[0])}
    groups = [Intervention(l, t, f, value=float(acts[l][t, f])) for l, t, f in sorted(both)]
    result = rm.intervene(graphs[0].tokens, groups, mode="steer").probabilities()
    assert swap.other_swapped == pytest.approx(float(result[int(two.answer)]))
    assert swap.features == len(both)
    longer = trace(rm, "3 0 17 9 9 28 4 5")
    assert check_swap(rm, one, two, graphs[0], longer) is None
