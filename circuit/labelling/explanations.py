"""Labels as Neuronpedia's explanation records: one JSON object a line, plain or gzipped.

{"modelId", "layer": "{layer}-{source set}", "index", "description", "explanationModelName", "typeName", "scores"}
"""

import gzip
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data.errors import UserError
from ..features import Label, Labels

LAYER = re.compile(r"^(\d+)(-.*)?$")
TYPE = "crosslace"


def write_explanations(
    labels: Labels,
    path: str | Path,
    model_id: str,
    source_set: str,
    scores: Mapping[tuple[int, int], Mapping[str, Any]] | None = None,
) -> Path:
    """All labels of a run, the guesses from tokens left out."""
    path = Path(path)
    lines = []
    for (layer, feature), label in sorted(labels.items()):
        if label.source == "tokens":
            continue
        record = {
            "modelId": model_id,
            "layer": f"{layer}-{source_set}",
            "index": str(feature),
            "description": label.text,
            "explanationModelName": label.source,
            "typeName": TYPE,
            "scores": dict((scores or {}).get((layer, feature), {})) | ({} if label.f1 is None else {"f1": label.f1}),
        }
        lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    data = "".join(lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    aside.replace(path)
    return path


def read_explanations(path: str | Path) -> Labels:
    """Labels from explanation records, ours or Neuronpedia's; each counts as a model's, whoever wrote it."""
    path = Path(path)
    labels = Labels()
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as explanation records ({error})") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            layer = LAYER.match(str(record["layer"]))
            index, description = int(record["index"]), record["description"]
            if layer is None or index < 0 or not isinstance(description, str) or not description.strip():
                raise ValueError("it names no layer, feature or description")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}, is no explanation record ({error})") from error
        labels.set(int(layer[1]), index, Label(description.strip(), "model"))
    return labels
