"""The worlds that come with the package, trained before: `model=world` is there at once, and the same everywhere.

A folder a size beside this file: the weights in float16 (a build rounds them, so nothing is lost), the tokenizer, and
world.json without the questions, which the code writes again. `key` in world.json is the hash of facts, recipe and
settings under which a built world lies in the cache: a world whose facts or recipe changed is not taken, but trained.
`crosslace world rebuild=true out=FOLDER` makes such a folder.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from .questions import Question
from .world import FACTS_FILE

SHIPPED = Path(__file__).parent / "shipped"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
WEIGHTS = "model.safetensors"


def shipped_world(key: str) -> Path | None:
    """The folder of the shipped world with this key."""
    records = ((path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(SHIPPED.glob(f"*/{FACTS_FILE}")))
    return next((path.parent for path, record in records if record["key"] == key), None)


def unpack(shipped: Path, questions: list[Question], folder: Path) -> None:
    """A shipped world as an ordinary model's folder: weights in float32 again, every question in its record."""
    for name in ("config.json", "generation_config.json", *TOKENIZER):
        shutil.copyfile(shipped / name, folder / name)
    weights = {name: tensor.float() for name, tensor in load_file(shipped / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_record(folder, json.loads((shipped / FACTS_FILE).read_text(encoding="utf-8")), questions)


def write_record(folder: Path, record: dict[str, Any], questions: list[Question]) -> None:
    """world.json: what is known of the world, then all its questions."""
    whole = record | {"questions": [asdict(question) for question in questions]}
    (folder / FACTS_FILE).write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


def pack_world(folder: Path, out: Path) -> None:
    """A built world in the form in which it is shipped."""
    out.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", *TOKENIZER):
        shutil.copyfile(folder / name, out / name)
    save_file({name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}, out / WEIGHTS)
    record = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    record.pop("questions")
    (out / FACTS_FILE).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
