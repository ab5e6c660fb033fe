# pyright: reportMissingImports=false
"""Run by another environment's interpreter: what other libraries' own loaders make of folders, no network.

PYTHON foreign_transcoders.py FOLDER...; each has `case.json` ({"loader", "files"}) and `x.safetensors` ([L, B, D]).
Where a library is not there, nothing is written.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt, load_gemma_scope_2_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from circuit_tracer.utils import hf_utils
from safetensors.torch import load_file, save_file

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels want a GPU even where Triton is without one
NEW = {"device": torch.device("cpu"), "dtype": torch.float32, "lazy_encoder": False, "lazy_decoder": False}
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out", "scan": "local"}


def outputs(folder, case, x):
    """[L, B, D] that the transcoder makes of x [L, B, D]."""
    paths = {layer: str(folder / name) for layer, name in enumerate(case["files"])}
    if case["loader"] in ("clt", "gemma-scope-2-clt"):
        if case["loader"] == "clt":
            transcoder = load_clt(str(folder), **HOOKS, **NEW)
        else:  # it leaves out the last path that it is given
            transcoder = load_gemma_scope_2_clt(paths | {len(paths): ""}, **HOOKS, **NEW)
        return transcoder.decode(transcoder.encode(x).to_sparse(), x)
    if case["loader"] == "saelens":
        from sae_lens import SAE

        return torch.stack([SAE.load_from_disk(folder / name)(x[layer]) for layer, name in enumerate(case["files"])])
    if case["loader"] == "sparsify":
        from sparsify import SparseCoder

        coders = [SparseCoder.load_from_disk(folder / name) for name in case["files"]]
        return torch.stack([coder(x[layer]).sae_out for layer, coder in enumerate(coders)])
    if case["loader"] == "hub":  # by the name of its place there; what it would download lies in the folder
        hf_utils.hf_hub_download = lambda repo_id, filename, **more: str(folder / filename)
        hf_utils.snapshot_download = lambda repo_id, **more: str(folder)
        transcoders, _ = hf_utils.load_transcoder_from_hub(
            f"someone/{folder.name}", NEW["device"], lazy_decoder=False, use_cache=False
        )
        if (folder / "W_enc_0.safetensors").is_file():
            return transcoders.decode(transcoders.encode(x).to_sparse(), x)
        return torch.stack([transcoders[layer](x[layer]) for layer in range(len(x))])
    special = None if case["loader"] == "plt" else case["loader"]
    transcoders = load_transcoder_set(paths, **HOOKS, **NEW, special_load_fn=special)
    return torch.stack([transcoders[layer](x[layer]) for layer in range(len(x))])


for name in sys.argv[1:]:
    folder = Path(name)
    case = json.loads((folder / "case.json").read_text())
    x = load_file(folder / "x.safetensors")["x"]
    with torch.no_grad(), contextlib.suppress(ImportError):
        save_file({"y": outputs(folder, case, x).contiguous()}, folder / "theirs.safetensors")
