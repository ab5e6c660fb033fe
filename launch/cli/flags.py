"""The command line's flags, as Hydra has them, apart from its settings.

`--help`, `--cfg job` (print the composed settings and stop), `--config-dir DIR` (presets of one's own, beside ./conf),
`-m` / `--multirun` (every combination of settings with several values), and `--plan` of `crosslace train` and `cache`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...data.errors import SettingsError

FLAGS = ("--help", "--cfg", "--config-dir", "--multirun")


class Flags(NamedTuple):
    """What was asked for beside settings."""

    help: bool
    cfg: bool
    multirun: bool
    words: list[str]
    """The settings; --config-dir has become Hydra's own `hydra.searchpath`."""


def read_flags(words: Sequence[str]) -> Flags:
    """Part flags from settings."""
    left = [part for word in words for part in _parted(word)]
    helped = cfg = multirun = False
    folders, settings = [], []
    while left:
        word = left.pop(0)
        if word in ("-h", "--help"):
            helped = True
        elif word in ("-m", "--multirun"):
            multirun = True
        elif word in ("-c", "--cfg"):
            if (asked := left.pop(0) if left else "") != "job":
                raise SettingsError(f"{word} {asked} is not known; it takes job, for the settings of the command")
            cfg = True
        elif word in ("-cd", "--config-dir"):
            if not left:
                raise SettingsError(f"{word} takes a folder of presets, such as ./conf")
            folders.append(left.pop(0))
        elif word == "--plan":
            settings.append("plan=true")
        elif word.startswith("-") and "=" not in word:
            raise SettingsError(f"{word} is not known; there are {', '.join(FLAGS)}, and settings written name=value")
        else:
            settings.append(word)
    searched = [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []
    return Flags(helped, cfg, multirun, [*searched, *settings])


def _parted(word: str) -> list[str]:
    """`--cfg=job` as two words."""
    name, equals, value = word.partition("=")
    return [name, value] if equals and name in FLAGS else [word]
