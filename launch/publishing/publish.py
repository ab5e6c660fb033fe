"""`crosslace publish`: a folder that the hub takes as it is, uploaded only when told where to.

README.md        the model card
config.yaml ...  circuit-tracer's files, where the transcoder has a form there; Crosslace reads them from the hub too
crosslace/       the transcoder as it is here, its evaluation, and the settings that it was made with
"""

import shutil
from pathlib import Path
from typing import Any

from ...data.errors import UserError
from ..terminal import Closing
from ..verbs import exchange
from ..workspace import Job, runs
from .card import model_card

ABOUT_THE_MACHINE = ("command", "host", "machine")
"""What transcoder.json says of where it was made, and others need not know."""


def run(job: Job) -> Closing:
    """Make the folder; upload it if `upload` says where to."""
    top, source, out = job.top, Path(job.top.run), Path(job.top.out)
    transcoder = runs.transcoder_folder(source)
    if not (source / "eval.json").is_file():
        raise UserError(
            f"{source} was not measured, and a card without figures helps nobody: `crosslace eval run={source}`"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name another folder to write to")
    runs.writable(out)
    elsewhere = None
    try:
        exchange.as_circuit_tracer(job, source, out)
    except UserError as error:
        elsewhere = str(error)
        out.mkdir(parents=True)
    shutil.copytree(transcoder, out / "crosslace")
    described = _without_the_machine(out / "crosslace" / "transcoder.json")
    result, settings = runs.read_json(source / "eval.json"), runs.saved_settings(source)
    result.get("made_with", {}).pop("settings", None)
    runs.write_json(out / "crosslace" / "eval.json", result)
    kept = {name: settings[name] for name in ("seed", "transcoder", "trainer") if name in settings}
    runs.write_yaml(out / "crosslace" / "settings.yaml", kept)
    place = top.upload or f"OWNER/{out.name}"
    runs.write_text(out / "README.md", model_card(place, top.license, described, settings, result, elsewhere))
    wrote = [(str(out / "README.md"), "the model card: read it, and say in it what only you know")]
    if top.upload:
        return Closing("published", wrote=[*wrote, (_upload(out, top.upload, top.private), "the hub's copy")])
    return Closing(
        "ready, and not uploaded",
        notes=[] if elsewhere is None else [f"circuit-tracer cannot read it: {elsewhere}"],
        wrote=wrote,
        next=[f"hf upload OWNER/{out.name} {out}"],
    )


def _without_the_machine(path: Path) -> dict[str, Any]:
    described = runs.read_json(path)
    for name in ABOUT_THE_MACHINE:
        described["meta"].get("made_with", {}).pop(name, None)
    runs.write_json(path, described)
    return described


def _upload(folder: Path, place: str, private: bool) -> str:
    """With the credentials that `hf auth login` or HF_TOKEN gave."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        hub.create_repo(place, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=place, folder_path=folder))
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"{folder} is ready, but nobody is logged in: `hf auth login`, then hf upload {place} {folder}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder} is ready, but the hub did not take it ({first}); `hf upload {place} {folder}` tries again"
        ) from error
