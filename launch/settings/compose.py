"""From the words on the command line to checked settings, through Hydra.

1. `tidy` makes plain overrides of the short forms (`store=stores/gpt2`, `tokens=100M`, a prompt with any characters).
2. `refuse_unknown` looks every name up, and answers a misspelt one with the nearest known.
3. Hydra composes presets and overrides over typed schemas made from the rooms' settings classes.
4. `Config.section` builds the settings objects themselves, which check what spans several fields.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...conf import ALIASES, SECTIONS, VERBS
from ...conf.describe import PACKAGE, Setting, closest, known_settings, preset_file, presets
from ...data.errors import SettingsError

GROUPS = ("launcher", "model", "dataset", "store", "transcoder", "trainer", "eval", "trace", "experiment")
_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([kKMBG])")
NO_SWEEPER = (
    "a sweep runs every combination, and takes no sweeper; for a search with an objective and pruning, "
    "`crosslace sweep ... print=wandb` prints a sweep for `wandb agent`, with method: bayes"
)
_QUOTED = re.compile(r"""^(['"]).*\1$""", re.DOTALL)


@dataclass
class Config:
    """The composed configuration of one command."""

    verb: str
    values: dict[str, Any]
    """All settings, resolved: top-level ones and one dictionary a section."""
    given: list[str]
    """The names that the command line itself set: `run`, `trainer.lr`, or a group's name for a preset."""

    def section(self, name: str) -> Any:
        """The settings object of one section."""
        return build(settings_class(name), dict(self.values[name]), f"{name}.")

    def top(self) -> Any:
        """The verb's own settings object."""
        cls = _load("launch/settings/verb_settings.py", VERBS[self.verb].settings)
        return build(cls, {field.name: self.values[field.name] for field in dataclasses.fields(cls)}, "")

    def as_yaml(self) -> str:
        """The verb's settings, as a preset would have them."""
        own = [field.name for field in dataclasses.fields(type(self.top()))]
        shown = {name: self.values[name] for name in (*own, *VERBS[self.verb].sections)}
        return OmegaConf.to_yaml(OmegaConf.create(shown))

    def check(self) -> None:
        """Build everything once, so that a contradiction is refused before any work starts."""
        self.top()
        for name in VERBS[self.verb].sections:
            self.section(name)

    def base_on(self, saved: dict[str, Any]) -> None:
        """Take the sections of `saved` (a run's settings) wherever the command line did not say otherwise."""
        for name, values in saved.items():
            if name not in SECTIONS or name not in VERBS[self.verb].sections or name in self.given:
                continue
            known = {key: value for key, value in values.items() if key in self.values[name]}
            for key, value in known.items():
                if f"{name}.{key}" not in self.given:
                    self.values[name][key] = value

    def go_on_with(self, saved: dict[str, Any]) -> None:
        """The settings of a run that goes on, wherever the command line did not say otherwise."""
        self.base_on(saved)
        self.values |= {key: saved[key] for key in ("seed", "init") if key in saved and key not in self.given}


def build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """A settings object from plain values, each of the type that the class states."""
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if not fits(value, hints[name]):
            raise SettingsError(f"{prefix}{name}={value} is not of the right type; it takes {_words(hints[name])}")
    return cls(**values)


def fits(value: Any, hint: Any) -> bool:
    """Does a plain value have the type of this annotation? (Every type that settings may have is known here.)"""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is types.NoneType:
        return value is None
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not typing.get_origin(hint) else str(hint)
    return Setting("", text.replace("typing.", ""), "", "").takes


def _load(module: str, name: str) -> type:
    dotted = module.removesuffix(".py").replace("/", ".")
    return getattr(import_module(f"...{dotted}", __package__), name)


def settings_class(section: str) -> type:
    """The settings class of a section, from its room."""
    return _load(SECTIONS[section].module, SECTIONS[section].settings)


def _schema(cls: type) -> type:
    """An open twin of a frozen settings class, for OmegaConf: what it cannot type is checked later by `build`."""
    fields = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name] if _typed(hints[field.name]) else Any
        if field.default_factory is not dataclasses.MISSING:
            fields.append((field.name, hint, dataclasses.field(default_factory=field.default_factory)))
        else:
            fields.append((field.name, hint, dataclasses.field(default=field.default)))
    return dataclasses.make_dataclass(cls.__name__, fields)


def _typed(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = {int, float, bool, str, types.NoneType}
    if all(option in plain for option in options):
        # OmegaConf would turn 8 into "8" in `str | int`, so only one type beside None is left to it.
        return len([option for option in options if option is not types.NoneType]) == 1
    lists = {list[int], list[float], list[str]}
    return len(options) - (types.NoneType in options) == 1 and any(option in lists for option in options)


def _root_schema(verb: str) -> type:
    """The verb's own settings, and a place for each section."""
    own = _schema(_load("launch/settings/verb_settings.py", VERBS[verb].settings))
    places = [(name, Any, dataclasses.field(default=None)) for name in SECTIONS]
    return dataclasses.make_dataclass(own.__name__, places, bases=(own,))


def register(verb: str, sections: Sequence[str]) -> str:
    """Register the schemas of some sections, and a verb's configuration of its own settings and those; its name."""
    store = ConfigStore.instance()
    for name in sections:
        store.store(group=name, name="schema", node=_schema(settings_class(name)))
    store.store(name="top", node=_root_schema(verb))
    chosen = [{name: SECTIONS[name].preset} for name in sections]
    store.store(name=f"of_{verb}", node={"defaults": ["top", *chosen, "_self_", {"experiment": None}]})
    return f"of_{verb}"


def compose_config(verb: str, words: Sequence[str]) -> Config:
    """The configuration of `crosslace VERB WORDS`; a mistake is one sentence in a SettingsError."""
    own = own_folders(words)
    if any(word.partition("=")[0] in ("sweeper", "hydra/sweeper") for word in words):
        raise SettingsError(NO_SWEEPER)
    overrides = tidy(verb, words)
    parsed = refuse_unknown(verb, overrides, own)
    given = [override.key_or_group.strip("+") for override in parsed]
    # Importing a room takes seconds: only an experiment, which may set any group, needs every section.
    root = register(verb, list(SECTIONS) if "experiment" in given else VERBS[verb].sections)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("crosslace.conf", version_base="1.3"):
            composed = compose(root, [*overrides, *_searched(own)])
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(in_one_sentence(verb, error)) from error
    assert isinstance(values, dict)
    if "experiment" in given:
        given += _set_by_experiment(next(o.value() for o in parsed if o.key_or_group == "experiment"), own)
    return Config(verb, {str(key): value for key, value in values.items() if key != "experiment"}, given)


def own_folders(words: Sequence[str]) -> list[Path]:
    """Where the user's own presets stand: what `hydra.searchpath` names, then ./conf."""
    named = [word.partition("=")[2] for word in words if word.startswith("hydra.searchpath=")]
    parts = [part.strip().strip("'\"") for folders in named for part in folders.strip("[]").split(",")]
    folders = [Path(part.removeprefix("file://")) for part in parts]
    for folder in folders:
        if not folder.is_dir():
            raise SettingsError(f"hydra.searchpath={folder} is no folder; it takes folders such as [./conf]")
    here = Path("conf")
    if here.is_dir() and here.resolve() != PACKAGE / "conf":
        folders.append(here)
    return folders


def _searched(own: Sequence[Path]) -> list[str]:
    places = ",".join(_quote(f"file://{folder.resolve()}") for folder in own)
    return [f"hydra.searchpath=[{places}]"] if own else []


def preset(group: str, name: Any, own: Sequence[Path] = ()) -> tuple[list[Any], dict[str, Any]]:
    """What a preset builds on, and the settings that it names itself."""
    plain = OmegaConf.to_container(OmegaConf.load(preset_file(group, name, own)))
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items()}
    return settings.pop("defaults", []), settings


def _set_by_experiment(name: Any, own: Sequence[Path]) -> list[str]:
    """The settings that an experiment preset names, or one that it builds on: they count as given."""
    bases, settings = preset("experiment", name, own)
    found = []
    for base in bases:
        pairs = base.items() if isinstance(base, dict) else [("experiment", base)]
        for key, value in pairs:
            group = str(key).removeprefix("override ").lstrip("/")
            if group == "experiment" and value != "_self_":
                found += _set_by_experiment(str(value).rpartition("/")[2], own)
            elif group != "experiment":
                found.append(group)
    for key, value in settings.items():
        found += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [str(key)]
    return found


def tidy(verb: str, words: Sequence[str], several: bool = False) -> list[str]:
    """Hydra's overrides from what people type; with `several`, commas part several values of a setting."""
    known, own = known_settings(verb), own_folders(words)
    overrides = []
    for word in words:
        if word.startswith("hydra.searchpath="):
            continue  # `compose_config` gives it on, with ./conf
        key, equals, value = word.partition("=")
        key = key.lstrip("+")
        key = ALIASES[key] if ALIASES.get(key) in known else key
        if not equals:
            raise SettingsError(f"`{word}` is not a setting; settings are written name=value, such as run=runs/clt")
        if key in SECTIONS and key in GROUPS + tuple(SECTIONS) and value not in presets(key, own):
            short = SECTIONS[key].shorthand
            if short is not None and not (several and "," in value):
                key = f"{key}.{short}"
        kind = known[key].type if key in known else ""
        if (amount := _AMOUNT.fullmatch(value)) and kind.startswith("int"):
            value = str(round(float(amount[1]) * _UNITS[amount[2]]))
        listed = several and "," in value
        if kind.startswith("str") and not (listed or value == "null" or _QUOTED.match(value)):
            value = _quote(value)
        opened = "++" if key.startswith("launcher.options.") else ""  # the launcher's own, which Hydra checks
        overrides.append(f"{opened}{key}={value}")
    return overrides


def _quote(text: str) -> str:
    """Hydra's quoted form of any text: nothing in it is read as grammar or as an interpolation."""
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", text)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    return "'" + escaped.replace("${", r"\${") + "'"


def refuse_unknown(verb: str, overrides: Sequence[str], own: Sequence[Path] = ()) -> list[Override]:
    """Look every override's name up; the parsed overrides."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise SettingsError(f"could not read the settings: {_first_line(error)}") from error
    known = known_settings(verb)
    taken = {*VERBS[verb].sections, "experiment"}
    for override in parsed:
        key = override.key_or_group
        if key.startswith("hydra"):
            continue
        if override.is_sweep_override():
            raise SettingsError(f"{key} takes one value here; several are for `crosslace sweep`, or for `-m`")
        if override.is_delete():
            raise SettingsError(f"~{key} is not possible: settings can be changed, not removed")
        if key in taken and key in GROUPS:
            _check_preset(key, override, own)
        elif key in taken:
            raise SettingsError(f"{key}={override.value()} is not possible; set {_fields_of(verb, key)}")
        elif key.startswith("launcher.options."):
            continue
        elif key not in known:
            raise SettingsError(_unknown(verb, key, list(known)))
    return parsed


def _check_preset(group: str, override: Override, own: Sequence[Path]) -> None:
    value, known = override.value(), presets(group, own)
    if value not in known:
        near = closest(str(value), known)
        guess = f"; did you mean {group}={near}?" if near else ""
        raise SettingsError(f"{group}={value} is not known{guess or ';'} it takes one of {', '.join(known)}")


def _fields_of(verb: str, section: str) -> str:
    names = [name for name in known_settings(verb) if name.startswith(f"{section}.")]
    return ", ".join(names)


def _unknown(verb: str, key: str, known: list[str]) -> str:
    near = closest(key, known)
    head = key.partition(".")[0]
    if head in SECTIONS and head not in VERBS[verb].sections:
        return f"{key} is not used by `crosslace {verb}`, which takes {', '.join(VERBS[verb].sections)} settings"
    if near is None:
        return f"{key} is not a setting of `crosslace {verb}`; `crosslace {verb} --help` lists them"
    setting = known_settings(verb)[near]
    return f"{key} is not a setting; did you mean {near} (it takes {setting.takes})?"


def in_one_sentence(verb: str, error: BaseException) -> str:
    """What is wrong with the settings, in words: Hydra's and OmegaConf's errors name the key but not what it takes."""
    cause: BaseException | None = error
    while cause is not None:
        full_key = getattr(cause, "full_key", None)
        setting = known_settings(verb).get(str(full_key).partition("[")[0]) if full_key else None
        if setting is not None:
            found = re.search(r"Value '(.*?)'", str(cause), re.DOTALL)
            value = f"={found[1]}" if found else ""
            return f"{setting.name}{value} is not of the right type; it takes {setting.takes}"
        if full_key and str(full_key).partition(".")[0] in SECTIONS:
            place = re.match(r"In '(.*?)'", str(error))
            return _unknown(verb, str(full_key), list(known_settings(verb))) + (
                f" (in {place[1]}.yaml)" if place else ""
            )
        cause = cause.__cause__ or cause.__context__
    return f"could not read the settings: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
