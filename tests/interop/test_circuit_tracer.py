"""circuit-tracer itself loads what we export, and finds the same graph: edge by edge, on the same model and prompt.

It lives in an environment of its own. `CROSSLACE_INTEROP_PYTHON` names that environment's interpreter; where it is not
set and `CROSSLACE_INTEROP=1` is (as in CI), one is made and circuit-tracer installed into it from the registry.
"""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from crosslace.circuit.formats import import_transcoder, open_foreign
from crosslace.circuit.formats.circuit_tracer import export_circuit_tracer
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement import Intervention
from crosslace.data.models.language_model import LanguageModel
from crosslace.launch.cli.main import main
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(1200)]

VERSION = "0.5.0"
BESIDE = ["sae-lens==6.54.12", "eai-sparsify==1.3.3", "simple-parsing", "docstring-parser", "natsort", "schedulefree"]
L, D, F, V, T = 3, 32, 96, 50, 9
CASES = {
    # name: (family, reach, activation, read, skip)
    "llama-plt": ("llama", "1", "jumprelu", "resid", False),
    "llama-plt-mlp-in": ("llama", "1", "jumprelu", "mlp_in", False),
    "llama-clt": ("llama", "all", "jumprelu", "resid", False),
    "llama-clt-batchtopk": ("llama", "all", "batchtopk", "mlp_in", False),
    "llama-plt-skip": ("llama", "1", "relu", "mlp_in", True),
    "gpt2-plt-batchtopk": ("gpt2", "1", "batchtopk", "resid", False),
    "gpt2-window": ("gpt2", "2", "jumprelu", "mlp_in", False),
}


@pytest.fixture(scope="session")
def foreign_python(tmp_path_factory) -> str:
    given = os.environ.get("CROSSLACE_INTEROP_PYTHON")
    if given:
        return given
    if os.environ.get("CROSSLACE_INTEROP") != "1":
        pytest.skip("set CROSSLACE_INTEROP_PYTHON, or CROSSLACE_INTEROP=1 to install circuit-tracer aside")
    folder = tmp_path_factory.mktemp("circuit-tracer")
    venv.create(folder, with_pip=True)
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name)
    install = [python, "-m", "pip", "install", "--quiet", f"circuit-tracer=={VERSION}"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"circuit-tracer cannot be installed:\n{done.stderr[-2000:]}"
    # by themselves, as they ask for other versions of what is there; a case whose library cannot be imported is skipped
    subprocess.run([*install[:5], "--no-deps", *BESIDE], capture_output=True, check=False)
    return python


def build(folder: Path, family: str, reach: str, activation: str, read: str, skip: bool) -> None:
    """A random model's folder, a transcoder of it, exported, and a prompt."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "vocab_size": V}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=D, n_layer=L, n_head=4, n_positions=32, **ends))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=D,
                num_hidden_layers=L,
                num_attention_heads=4,
                num_key_value_heads=2 if reach == "1" else 4,
                intermediate_size=2 * D,
                max_position_embeddings=32,
                **ends,
            )
        )
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder / "model")
    settings = TranscoderSettings(features=F, reach=reach, activation=activation, read=read, skip=skip)
    transcoder = Transcoder(settings, D, L, seed=1)
    with torch.no_grad():
        for parameter in [*transcoder.W_enc, *transcoder.b_enc, *transcoder.b_dec, *transcoder.W_skip]:
            parameter += 0.2 * torch.randn_like(parameter)
        for log_theta in transcoder.log_theta:
            log_theta.uniform_(-2.0, 0.5)
    # what a finished run does: normalisation folded, choices among a batch turned into thresholds
    thresholds = [0.5 + torch.rand(F) for _ in range(L)] if activation == "batchtopk" else None
    raw = transcoder.folded(torch.tensor([1.0, 0.8, 1.3]), torch.tensor([2.0, 1.5, 0.7]), thresholds)
    raw.save(folder / "ours")
    export_circuit_tracer(raw, folder / "exported", model_name=f"random-{family}")
    save_file({"tokens": torch.randint(0, V, (T,))}, folder / "prompt.safetensors")


def run_foreign(python: str, script: str, root: Path, names: Iterable[str]) -> None:
    """Let circuit-tracer work on folders of `root`."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [python, str(Path(__file__).with_name(script)), *(str(root / name) for name in names)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        cwd=root,
    )
    assert done.returncode == 0, f"circuit-tracer failed:\n{done.stderr[-4000:]}"


@pytest.fixture(scope="session")
def attributed(foreign_python, tmp_path_factory) -> Path:
    """Every case's folder, with circuit-tracer's graph in it."""
    root = tmp_path_factory.mktemp("cases")
    for name, options in CASES.items():
        build(root / name, *options)
    run_foreign(foreign_python, "foreign_attribution.py", root, CASES)
    return root


def ours(folder: Path) -> tuple[ReplacementModel, torch.Tensor]:
    """A case's model and transcoder here, and its prompt."""
    lm = LanguageModel(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32))
    return ReplacementModel(lm, Transcoder.load(folder / "ours")), load_file(folder / "prompt.safetensors")["tokens"]


@pytest.mark.parametrize("case", CASES)
def test_edge_by_edge(attributed, case):
    folder = attributed / case
    theirs = load_file(folder / "theirs.safetensors")
    model, tokens = ours(folder)
    graph = model.trace(tokens, max_logits=5, logit_mass=0.8)
    nodes = graph.nodes

    features = nodes.mask("feature")
    places = torch.stack([nodes.layer[features], nodes.position[features], nodes.index[features]], 1)
    assert len(places) > 50
    assert torch.equal(places, theirs["features"])
    torch.testing.assert_close(nodes.activation[features].float(), theirs["activations"], rtol=1e-4, atol=1e-5)
    assert torch.equal(nodes.index[nodes.mask("logit")], theirs["logits"])
    torch.testing.assert_close(graph.probabilities.float(), theirs["probabilities"], rtol=1e-4, atol=1e-5)

    # They have no biases or position embeddings, and no error at position 0, which is the model's own output there.
    n, rows = len(places), len(theirs["adjacency"])
    shared = nodes.mask("feature", "error", "kept", "embedding", "logit")
    edges = graph.adjacency[shared][:, shared]
    assert edges.shape == (rows, rows)
    compared = torch.ones(rows, dtype=torch.bool)
    compared[n : n + L * T : T] = False
    if model.transcoder.settings.skip:
        # At position 0 their errors are taken as zero, yet the skip passes there; here the model's own output stands.
        compared[n + L * T] = False
    difference = (edges - theirs["adjacency"])[:, compared].abs().max()
    largest = theirs["adjacency"].abs().max()
    assert difference <= 1e-4 * largest, f"edges differ by {float(difference / largest):.1e} of the largest"


MODES = {
    "steer": {"mode": "steer"},
    "steer, attention frozen": {"mode": "steer", "freeze": ["attention"]},
    # norms are live inside the range there, and what features write past it is left out
    "constrained": {"mode": "steer", "mlps": {range(2): "clean"}, "freeze": ["attention"], "past_range": False},
    "direct": {"mode": "direct"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_interventions_give_the_same_logits(attributed, case, mode):
    """Two features of two layers, set to minus twice what they are, in every mode that circuit-tracer has."""
    theirs = load_file(attributed / case / "theirs.safetensors")
    model, tokens = ours(attributed / case)
    places = [(int(l), int(t), int(f), value) for l, t, f, value in theirs["changes"].tolist()]
    change = [Intervention(l, t, f, value=value) for l, t, f, value in places]
    result = model.intervene(tokens, change, **MODES[mode])
    moved = (result.logits - result.clean_logits).abs().max()
    difference = (result.logits - theirs[f"steered/{mode}"]).abs().max()
    assert moved > 0.05 and difference < 1e-4, f"logits differ by {float(difference):.1e} where they moved {moved:.2f}"


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_its_own_functions(attributed, case):
    theirs = load_file(attributed / case / "theirs.safetensors")
    model, tokens = ours(attributed / case)
    scores = model.trace(tokens, max_logits=5, logit_mass=0.8).scores()
    found = [scores["replacement_score_ct"], scores["completeness_ct"]]
    # at position 0 the skip passes there, while here the model's own output stands: the embedding there has other edges
    tolerance = 2e-2 if model.transcoder.settings.skip else 1e-6
    assert found == pytest.approx(theirs["scores"].tolist(), abs=tolerance)


NAMES = {"clt": "W_enc_{}.safetensors", "gemma-scope": "{}.npz", "saelens": "layer_{}", "sparsify": "layers.{}.mlp"}
WITH_SKIP = ("plt", "gemma-scope-2", "gemma-scope-2-clt", "saelens", "sparsify")
FOREIGN = [("clt", 0), ("gemma-scope", 0), *((loader, skip) for loader in WITH_SKIP for skip in (0, 1))]


def foreign_folder(folder: Path, loader: str, skip: int) -> None:
    """A transcoder as others publish it, by the format's description, and inputs."""
    folder.mkdir()
    random = torch.Generator().manual_seed(len(loader))
    drawn = lambda *shape: torch.randn(shape, generator=random) * 0.3
    files = [NAMES.get(loader, "layer_{}.safetensors").format(i) for i in range(L)]
    for i, name in enumerate(files):
        enc, b_enc, b_dec, theta, W_skip = drawn(F, D), drawn(F), drawn(D), drawn(F).abs(), drawn(D, D)
        weights = {"b_enc": b_enc, "b_dec": b_dec}
        if loader == "clt":
            encoder = {f"W_enc_{i}": enc, f"b_enc_{i}": b_enc, f"b_dec_{i}": b_dec, f"threshold_{i}": theta}
            save_file(encoder, folder / name)
            save_file({f"W_dec_{i}": drawn(F, L - i, D)}, folder / f"W_dec_{i}.safetensors")
        elif loader == "plt":
            weights |= {"W_enc": enc, "W_dec": drawn(F, D), "activation_function.threshold": theta}
            save_file(weights | ({"W_skip": W_skip} if skip else {}), folder / name)
        elif loader == "saelens":
            (folder / name).mkdir()
            weights |= {"W_enc": enc.T.contiguous(), "W_dec": drawn(F, D), "threshold": theta}
            save_file(weights | ({"W_skip": W_skip} if skip else {}), folder / name / "sae_weights.safetensors")
            hooks = {"hook_name": f"blocks.{i}.mlp.hook_in", "hook_name_out": f"blocks.{i}.hook_mlp_out"}
            kind = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
            config = {
                "architecture": kind,
                "d_in": D,
                "d_sae": F,
                "d_out": D,
                "dtype": "float32",
                "device": "cpu",
                "apply_b_dec_to_input": False,
            }
            (folder / name / "cfg.json").write_text(json.dumps(config | {"metadata": {"model_name": "x", **hooks}}))
        elif loader == "sparsify":
            (folder / name).mkdir()
            weights = {"encoder.weight": enc, "encoder.bias": b_enc, "W_dec": drawn(F, D), "b_dec": b_dec}
            save_file(weights | ({"W_skip": W_skip} if skip else {}), folder / name / "sae.safetensors")
            config = {"activation": "topk", "num_latents": F, "k": 8, "transcode": True, "d_in": D}
            (folder / name / "cfg.json").write_text(json.dumps(config | {"skip_connection": bool(skip)}))
        elif loader == "gemma-scope":
            weights |= {"W_enc": enc.T.contiguous(), "W_dec": drawn(F, D), "threshold": theta}
            np.savez(folder / name, **{key: tensor.numpy() for key, tensor in weights.items()})
        else:
            decoders = drawn(F, L, D) if loader == "gemma-scope-2-clt" else drawn(F, D)
            weights |= {"w_enc": enc.T.contiguous(), "w_dec": decoders, "threshold": theta}
            save_file(weights | ({"affine_skip_connection": W_skip} if skip else {}), folder / name)
    if loader not in ("saelens", "sparsify"):
        hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
        kind = "cross_layer_transcoder" if "clt" in loader else "transcoder_set"
        listed = {} if loader == "clt" else {"transcoders": files}
        (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": kind, "model_name": "x", **hooks, **listed}))
    (folder / "case.json").write_text(json.dumps({"loader": loader, "files": files}))
    save_file({"x": drawn(L, 7, D)}, folder / "x.safetensors")


@pytest.fixture(scope="session")
def read_elsewhere(foreign_python, tmp_path_factory) -> Path:
    """Every foreign folder, with what its own library makes of the inputs."""
    root = tmp_path_factory.mktemp("foreign")
    for loader, skip in FOREIGN:
        foreign_folder(root / f"{loader}-{skip}", loader, skip)
    run_foreign(foreign_python, "foreign_transcoders.py", root, [f"{loader}-{skip}" for loader, skip in FOREIGN])
    return root


@pytest.mark.parametrize(("loader", "skip"), FOREIGN)
def test_foreign_folders_say_the_same_there(read_elsewhere, loader, skip, tmp_path):
    """What another library makes of its folder is what an imported one says."""
    folder = read_elsewhere / f"{loader}-{skip}"
    if not (folder / "theirs.safetensors").is_file():
        pytest.skip(f"the other environment has no library that reads {loader}")
    transcoder = Transcoder.load(import_transcoder(open_foreign(folder), tmp_path / "ours"))
    x, theirs = (load_file(folder / f"{name}.safetensors")[key] for name, key in (("x", "x"), ("theirs", "y")))
    found = transcoder(x.transpose(0, 1)).detach().transpose(0, 1)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["llama-plt", "llama-clt", "llama-clt-batchtopk"])
def test_a_published_folder_says_the_same_there(foreign_python, case, tmp_path):
    """What `crosslace publish` makes, loaded there as from the hub."""
    build(tmp_path / "built", *CASES[case])
    run, out = tmp_path / "run", tmp_path / "published"
    run.mkdir()
    (tmp_path / "built" / "ours").rename(run / "transcoder")
    result = {"tokens": 10, "overall": {"nmse": 0.5}, "behaviour": {}, "verdicts": []}
    (run / "eval.json").write_text(json.dumps(result))
    assert main(["publish", f"run={run}", f"out={out}", "license=mit", f"model={tmp_path / 'built' / 'model'}"]) == 0
    x = torch.randn(L, 7, D)
    save_file({"x": x}, out / "x.safetensors")
    (out / "case.json").write_text(json.dumps({"loader": "hub", "files": []}))
    run_foreign(foreign_python, "foreign_transcoders.py", tmp_path, ["published"])
    theirs = load_file(out / "theirs.safetensors")["y"]
    found = Transcoder.load(run / "transcoder")(x.transpose(0, 1)).detach().transpose(0, 1)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
