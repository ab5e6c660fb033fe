"""Why a head looked there (queries and keys), on a tiny random model of every family, in float64.

What terms add up to is one check; the other is independent: sources are taken out of the residual stream that the layer
reads and the model's own attention is run again.
"""

import pytest
import torch
from crosslace.circuit.attribution.forward import carry, freeze_prompt
from crosslace.circuit.attribution.qk import CONSTANT, attention
from crosslace.circuit.model import ReplacementModel
from crosslace.data.errors import UserError
from crosslace.data.models import listen

PROMPT = [5, 0, 9, 3, 0, 7]
CLOSE = 1e-9
KIND = {"reach": "all", "activation": "relu", "skip": True}
ALL = {"sources": 10**6, "most_keys": 100}
PLACES = [(0, 3, 5), (1, 0, 4), (2, 2, 5)]  # layer, head, query
NORMED_PHI = {"qk_layernorm": True}  # a layer norm on queries and keys: it centres, over the head alone


@pytest.fixture(scope="module")
def make_looked(make_tiny, make_replacement):
    """A model that is left alone at one position, and what its heads looked at."""
    made: dict = {}

    def make(family: str, **kind):
        key = (family, *kind.items())
        if key not in made:
            replacement = make_replacement(family.removesuffix(":normed"), **(KIND | kind))
            if family == "phi:normed":
                replacement = ReplacementModel(make_tiny("phi", torch.float64, **NORMED_PHI), replacement.transcoder)
            before = replacement.masked_positions
            replacement.masked_positions = lambda *more, **named: (
                before(*more, **named) | (torch.arange(len(PROMPT)) == 2)
            )
            made[key] = replacement, [attention(replacement, PROMPT, *place, **ALL) for place in PLACES]
        return made[key]

    return make


FAMILIES = pytest.mark.parametrize("family", ["phi:normed"])


def check_sums(looked):
    for a in looked:
        at = [a.keys.tolist().index(key) for key in a.explained]
        assert sorted(at) == list(range(len(a.keys)))  # all keys
        # each side sums to the score, and so do all pairs, the constants among them
        for side in (a.rows, a.cols):
            torch.testing.assert_close(side.sum(0), a.scores[at], rtol=0, atol=CLOSE)
        torch.testing.assert_close(a.pairs.sum((0, 1)), a.scores, rtol=0, atol=CLOSE)
        assert a.violation < CLOSE
        # the strong sources' marginals are those of their pairs with everything
        chosen = [id if id != CONSTANT else len(a.nodes) for id in a.chosen]
        torch.testing.assert_close(a.pairs.sum(1)[:, at], a.rows[chosen], rtol=0, atol=CLOSE)
        torch.testing.assert_close(a.pairs.sum(0)[:, at], a.cols[chosen], rtol=0, atol=CLOSE)
        # an accounting check: capped scores, centred over the keys, are log pattern + entropy
        if float((a.pattern.sum() - 1).abs()) < 1e-12:  # no learned sink
            entropy = -(a.pattern * a.pattern.log()).sum()
            centred = a.capped - (a.pattern * a.capped).sum()
            torch.testing.assert_close(centred, a.pattern.log() + entropy, rtol=0, atol=CLOSE)
        assert a.remainder(count=10**6) == pytest.approx({"query": 0, "key": 0, "pairs": 0}, abs=CLOSE)


def test_marginals_and_pairs_sum_to_the_score(family, make_looked):
    check_sums(make_looked(family)[1])


def test_marginals_and_pairs_of_centred_queries(make_looked):
    check_sums(make_looked("phi:normed")[1])


def test_the_pattern_is_the_models(family, make_looked):
    replacement, looked = make_looked(family)
    frozen = freeze_prompt(replacement, torch.tensor(PROMPT))
    for a in looked:
        model = frozen.recording.patterns[a.layer][a.head, a.query]
        torch.testing.assert_close(a.pattern, model[a.keys], rtol=0, atol=1e-6)  # their softmax is float32
        assert (model.nonzero().squeeze(1) == a.keys).all()


class Rerun:
    """One layer's attention run again by the model itself, with changed residual streams and query and key norms as
    they were; through the hooks of this test, not the code under test."""

    def __init__(self, replacement, layer):
        self.lm, self.layer = replacement.lm, layer
        tokens = torch.tensor(PROMPT)
        with listen(self.lm, layer) as heard:
            self.frozen = freeze_prompt(replacement, tokens)
        assert heard.called is not None
        self.args, self.kwargs = heard.called
        self.x = self.frozen.recording.layer_in[layer]
        self.denominators: dict = {}
        self.scores(self.x)

    def scores(self, x):
        """[H, T, T] and the keyword arguments of the attention call."""
        parts, found = self.lm.layers[self.layer], {}
        denominator = self.frozen.recording.denominators.get((self.layer, "attn_norm"))
        hidden = x if denominator is None else parts.attn_norm.frozen(x, denominator)

        def seen(module, q, k, v, mask, **kwargs):
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            found["scores"] = (q @ k.transpose(-1, -2))[0] * kwargs["scaling"]
            found["cap"], found["sinks"] = kwargs.get("softcap"), kwargs.get("s_aux")
            found["mask"] = mask[0, 0]
            return v.new_zeros(1, q.shape[2], q.shape[1], q.shape[3]), None

        def frozen(norm):
            def hook(module, args, output):
                kept = self.denominators.setdefault(id(module), norm.denominator(args[0]))
                return norm.frozen(args[0], kept)

            return hook

        handles = [
            norm.module.register_forward_hook(frozen(norm)) for norm in (parts.query_norm, parts.key_norm) if norm
        ]
        args = (hidden[None], *self.args[1:]) if self.args else ()
        kwargs = self.kwargs if self.args else self.kwargs | {"hidden_states": hidden[None]}
        with self.lm.attend_with(seen):
            parts.attn(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return found

    def log_pattern(self, found, head, query):
        s = found["scores"][head, query]
        s = s if found["cap"] is None else found["cap"] * torch.tanh(s / found["cap"])
        s = s + found["mask"][query]
        both = s if found["sinks"] is None else torch.cat([s, found["sinks"][head][None].to(s)])
        return s - both.logsumexp(0)


def check_silencing(replacement, looked):
    moved_most = 0.0
    for a in looked:
        rerun = Rerun(replacement, a.layer)
        clean = rerun.scores(rerun.x)
        log_clean = rerun.log_pattern(clean, a.head, a.query)
        order = [id for id in a.chosen if id != CONSTANT]
        kinds = {a.nodes[id].kind: id for id in order}
        for id in {*order[:: max(1, len(order) // 6)], *kinds.values()}:
            F, first = carry(rerun.frozen.model, [a.nodes[id]], a.layer)
            c = a.chosen.index(id)
            x = rerun.x.clone()
            x[first:] -= F[0]
            without = rerun.scores(x)
            moved = (without["scores"] - clean["scores"])[a.head, a.query, a.keys]
            torch.testing.assert_close(a.moved[c], moved, rtol=0, atol=CLOSE)
            change = (rerun.log_pattern(without, a.head, a.query) - log_clean)[a.keys]
            torch.testing.assert_close(a.moved_log_pattern[c], change, rtol=0, atol=CLOSE)
            moved_most = max(moved_most, float(change.abs().max()))
            # to first order: a small step, both ways
            step = 1e-5
            x[first:] = rerun.x[first:] + step * F[0]
            up = rerun.log_pattern(rerun.scores(x), a.head, a.query)
            x[first:] = rerun.x[first:] - step * F[0]
            down = rerun.log_pattern(rerun.scores(x), a.head, a.query)
            slope = ((up - down) / (2 * step))[a.explained]
            torch.testing.assert_close(a.log_pattern[id], slope, rtol=0, atol=1e-7)
    assert moved_most > 0.02


def test_silencing_a_source_moves_scores_and_pattern_as_said(family, make_looked):
    """A source is taken out of the residual stream and attention run again: score, pattern exactly, and its slope."""
    check_silencing(*make_looked(family))


def test_silencing_before_norms_that_centre(make_looked):
    check_silencing(*make_looked("phi:normed"))


@pytest.mark.parametrize("kind", [{"reach": "1", "skip": False}, {"reach": "2", "read": "mlp_in"}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "olmo2"])
def test_other_kinds_of_transcoder(family, kind, make_looked):
    replacement, looked = make_looked(family, **kind)
    check_sums(looked)
    check_silencing(replacement, looked)


def test_the_strongest_terms_are_those_of_the_whole(make_looked):
    """A short explanation holds the same numbers as the whole one, the strongest of them, both signs."""
    replacement, looked = make_looked("gemma2")
    whole = looked[2]
    short = attention(replacement, PROMPT, 2, 2, -1, most_keys=2, sources=5)
    assert short.explained == whole.explained[:2] and len(short.chosen) <= 6
    for side in ("query", "key", "attention"):
        for one, same in zip(short.marginals(side, count=4), whole.marginals(side, count=4), strict=True):
            assert one.source == same.source and one.value == pytest.approx(same.value)
    assert any(one.value < 0 for one in whole.marginals("attention", count=20))
    values = {(pair.query, pair.key): pair.value for pair in whole.strongest_pairs(count=10**6)}
    for pair in short.strongest_pairs(count=5):
        assert values[pair.query, pair.key] == pytest.approx(pair.value)
    silenced = {one.source: one for one in whole.silenced()}
    for one in short.silenced():
        assert tuple(one) == pytest.approx(tuple(silenced[one.source]))
    named = attention(replacement, PROMPT, 2, 2, 5, keys=[whole.explained[-1]])
    torch.testing.assert_close(named.rows[:, 0], whole.rows[:, -1])
    rest = short.remainder(count=3)
    kept = sum(one.value for one in short.marginals("query", count=3))
    assert rest["query"] == pytest.approx(float(short.scores[short.keys.tolist().index(short.explained[0])]) - kept)


def test_bad_input_is_refused_in_a_sentence(make_looked, monkeypatch):
    replacement, looked = make_looked("mistral")  # a window of four tokens
    for arguments, reason in (
        ({"layer": 3, "head": 0}, "layer 3 is not there; the model has layers 0 to 2"),
        ({"layer": 0, "head": 4}, "head 4 is not there; layer 0 has heads 0 to 3"),
        ({"layer": 0, "head": 0, "query": 6}, "query 6 is outside the prompt, which has 6 tokens"),
        ({"layer": 0, "head": 0, "query": 2, "keys": [3]}, "key 3 is masked for query 2, which may look at 0 to 2"),
        ({"layer": 0, "head": 0, "query": 5, "keys": [0]}, "key 0 is masked for query 5, which may look at 2 to 5"),
        ({"layer": 0, "head": 0, "keys": []}, "keys is empty"),
        ({"layer": 0, "head": 0, "most_keys": 0}, "most_keys"),
    ):
        with pytest.raises(UserError, match=reason):
            replacement.attention(PROMPT, **arguments)
    with pytest.raises(UserError, match="key 1 is not among those explained"):
        looked[0].marginals("query", key=1)
    # attention that is no softmax of products
    parts = replacement.lm.layers[1]
    forward = parts.attn.forward
    monkeypatch.setattr(parts.attn, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(UserError, match=r"attention of layer 1 is of a kind that is not supported"):
        replacement.attention(PROMPT, 1, 0)
    monkeypatch.setattr(parts.attn, "forward", forward)
    eager = __import__(type(parts.attn).__module__, fromlist=["x"])
    usual = eager.eager_attention_forward

    def other(*args, **kwargs):
        out, pattern = usual(*args, **kwargs)
        return out, pattern**2 / (pattern**2).sum(-1, keepdim=True)

    monkeypatch.setattr(eager, "eager_attention_forward", other)
    with pytest.raises(UserError, match="differs from its pattern"):
        replacement.attention(PROMPT, 1, 0)
