"""Tiny random models of every family of `data/models/families.py`, for tests in any room.

They are small enough to build in milliseconds, yet have what makes each family different: grouped queries, sliding
windows shorter than the prompts, soft caps that bite, biases and norm weights that are not at their neutral values.
"""

from typing import Any

import torch
from crosslace.data.models.families import FAMILIES
from crosslace.data.models.language_model import LanguageModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, WIDTH, VOCABULARY = 3, 16, 32
_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_GQA,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
# what differs from the defaults, per family; a name after a colon is a variant of the family before it
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_inner": 24,
        "n_positions": 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {"num_key_value_heads": None, "use_parallel_residual": True},
    "gpt_neox:sequential": {"num_key_value_heads": None, "use_parallel_residual": False},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {"use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "use_sliding_window": False},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "gemma": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": _SLIDING,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 1.0,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": _SLIDING},
    "gemma3": {
        "text_config": {
            **_COMMON,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": _SLIDING,
        },
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 31,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 4, "layer_types": _SLIDING},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 4, "original_max_position_embeddings": 64},
    "smollm3": {"use_sliding_window": False, "no_rope_layers": [1, 0, 1]},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "layer_types": _SLIDING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
TINY_FAMILIES = tuple(SPECIAL)
assert {name.partition(":")[0] for name in SPECIAL} == set(FAMILIES)

# families whose norms compute in the model's own dtype: with attention frozen, float64 is float64 throughout
EXACT_FAMILIES = ("gpt2", "gpt_neox", "gpt_neox:sequential", "phi")


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    model_type = family.partition(":")[0]
    common = {} if model_type in ("gpt2", "gemma3") else _COMMON
    return AutoConfig.for_model(model_type, **{**common, **SPECIAL[family], **changes})


def make_tiny(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random model without a tokenizer; the same for the same arguments, and in any dtype up to rounding."""
    config = tiny_config(family, **changes)
    config._experts_implementation = "eager"  # fused expert kernels have no float64
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters(), key=lambda pair: pair[0]):
            # Larger than any default: attention that is far from uniform, norms and biases that matter.
            scale = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") and "gemma" not in family else 0.0
            offset = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else offset
            weight.copy_(torch.randn(weight.shape, generator=random) * scale + offset)
        model.tie_weights()  # type: ignore[operator]
    return LanguageModel(model.to(dtype), name=f"tiny-{family}")
