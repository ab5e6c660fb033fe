"""A model that learnt to go on with random tokens that repeat: previous-token and induction heads are found by name."""

import pytest
import torch
from crosslace.circuit.model import ReplacementModel
from crosslace.data.models import LanguageModel
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder import Transcoder

VOCABULARY, LONGEST, PERIOD = 48, 12, 10


def repeated(random: torch.Generator, rows: int, period: int) -> torch.Tensor:
    """Token 0, then `period` random tokens twice over."""
    x = torch.randint(1, VOCABULARY, (rows, period), generator=random)
    return torch.cat([torch.zeros(rows, 1, dtype=torch.long), x, x], 1)


def train() -> LanguageModel:
    """Two layers, until the second half is known: some 350 steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=64, **none))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    random = torch.Generator().manual_seed(1)
    for step in range(2000):
        n = int(torch.randint(6, LONGEST + 1, (1,), generator=random))
        tokens = repeated(random, 64, n)
        logits = model(tokens).logits[:, n + 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, n + 2 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02 and step > 200:
            return LanguageModel(model)
    pytest.fail(f"the model has not learnt to repeat: loss {float(loss):.3f}")


@pytest.mark.slow
def test_previous_token_and_induction_heads_are_found_by_name():
    lm = train()
    transcoder = Transcoder(TranscoderSettings(features=8, activation="relu", reach="1"), lm.d_model, 2, seed=0)
    for bias in transcoder.b_enc:
        bias.data.fill_(-1e6)  # no features: tokens and what MLPs write are the only sources
    replacement = ReplacementModel(lm, transcoder.requires_grad_(False))
    random = torch.Generator().manual_seed(99)
    back_by_one = torch.zeros(4)
    told = torch.zeros(4)
    questions = 0
    for _ in range(3):
        half = torch.randperm(VOCABULARY - 1, generator=random)[:PERIOD] + 1
        tokens = torch.cat([torch.zeros(1, dtype=torch.long), half, half])
        pattern = replacement.clean(tokens[None]).patterns[0][0]
        back_by_one += pattern.diagonal(-1, 1, 2).mean(1) / 3
        for query in range(PERIOD + 1, 2 * PERIOD):
            questions += 1
            key = query - PERIOD + 1  # the token after the earlier one like this
            for head in range(4):
                told[head] += explained_by_induction(replacement, tokens, head, query, key)
    assert float(back_by_one.max()) > 0.5, "a head of layer 0 looks back by one"
    assert float(told.max()) >= 0.95 * questions, "a head of layer 1 says that it looks for what followed its own token"


def explained_by_induction(replacement, tokens, head, query, key) -> bool:
    """It looks at the key most; the strongest pair is its own token's embedding with that of the token before the key,
    which is the same token and has come there by a head that looks back by one."""
    looked = replacement.attention(tokens.tolist(), 1, head, query, most_keys=1)
    if looked.explained != [key]:
        return False
    pair, nodes = looked.strongest_pairs(count=1)[0], looked.nodes
    own, before = nodes[pair.query], nodes[pair.key]
    embeddings = own.kind == before.kind == "embedding"
    return embeddings and pair.value > 0 and (own.position, before.position) == (query, key - 1)
