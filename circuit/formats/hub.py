"""Files of the Hugging Face hub, by name: `hub:OWNER/NAME[@revision][:subfolder]` and `hf://OWNER/NAME/FILE`."""

import re
from pathlib import Path

from ...data.errors import UserError

SOURCE = re.compile(r"(?:hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?")
WANTED = ["*.safetensors", "*.npz", "*.json", "*.yaml"]


def local_folder(source: str | Path) -> Path:
    """The folder that a source names: itself where it is on this machine, else the hub's, in the hub's own cache."""
    if not str(source).startswith("hub:"):
        if Path(source).exists():
            return Path(source)
        if not SOURCE.fullmatch(str(source)):
            raise UserError(f"there is nothing at {source}; name a folder, or hub:OWNER/NAME[@revision][:subfolder]")
    match = SOURCE.fullmatch(str(source))
    if match is None:
        raise UserError(f"{source} is not a place on the hub; it takes hub:OWNER/NAME[@revision][:subfolder]")
    from huggingface_hub import snapshot_download

    name, revision, subfolder = match.groups()
    patterns = (
        [f"{subfolder}/{end}" for end in WANTED] + [f"{subfolder}/**/{end}" for end in WANTED] if subfolder else WANTED
    )
    folder = Path(_asked(snapshot_download, source, repo_id=name, revision=revision, allow_patterns=patterns))
    folder = folder / subfolder if subfolder else folder
    if not folder.is_dir():
        raise UserError(f"{source}: {name} has no folder {subfolder}")
    return folder


def hub_file(uri: str) -> Path:
    """The file that `hf://OWNER/NAME/FILE[?revision=...]` names."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([\w./-]+)(?:\?revision=([\w./-]+))?", uri)
    if match is None or ".." in match[2]:
        raise UserError(f"{uri} is not a file on the hub; it takes hf://OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download

    return Path(_asked(hf_hub_download, uri, repo_id=match[1], filename=match[2], revision=match[3]))


def _asked(download, source: str | Path, **named) -> str:
    try:
        return download(**named)
    except (OSError, ValueError, RuntimeError) as error:  # what the hub's client raises, whatever its HTTP library
        raise UserError(f"{source} cannot be had from the hub ({type(error).__name__}: {error})") from error
