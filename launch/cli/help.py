"""`crosslace --help` and `crosslace VERB --help`."""

import shutil
import sys
import textwrap

from ...conf import ALIASES, SECTIONS, VERBS
from ...conf.describe import Setting, presets, section_settings, verb_settings


def overview() -> None:
    """The verbs, a line each."""
    width = max(map(len, VERBS))
    print("crosslace VERB [name=value ...]\n\nFrom a language model to a circuit: cache, train, eval, trace, view.\n")
    for name, verb in VERBS.items():
        print(f"  {name:<{width}}  {verb.summary}")
    print("\nStart with `crosslace demo`; `crosslace VERB --help` shows a verb's settings and an example.")


def verb_help(name: str) -> None:
    """One verb: what it does, examples, and every setting with its documentation and default."""
    verb = VERBS[name]
    print(f"crosslace {name} [name=value ...]\n\n{verb.summary[0].upper()}{verb.summary[1:]}.\n")
    print("\n".join(f"  {example}" for example in verb.examples))
    _block("settings", verb_settings(name))
    for section in verb.sections:
        summary = SECTIONS[section].summary
        names = presets(section)
        choice = f"; {section}=PRESET takes {', '.join(names)}" if names else ""
        short = SECTIONS[section].shorthand
        other = f"{' or' if names else ';'} {section}=... is short for {section}.{short}" if short else ""
        aliases = "".join(f"; {k}=... is short for {v}" for k, v in ALIASES.items() if v.startswith(f"{section}."))
        _block(f"{section}: {summary}{choice}{other}{aliases}", section_settings(section))
    print(f"\nexperiment=PRESET sets several groups at once: {', '.join(presets('experiment'))}")
    print("debug=true shows the traceback of an error.")


def _block(title: str, settings: tuple[Setting, ...]) -> None:
    wide = min(shutil.get_terminal_size((110, 24)).columns, 120) if sys.stdout.isatty() else 110
    print("\n" + textwrap.fill(title, wide, subsequent_indent="  "))
    for setting in settings:
        default = f" = {setting.default}" if setting.default else ""
        print(f"  {setting.name}{default}  ({setting.takes})")
        if setting.doc:
            print(textwrap.fill(setting.doc, wide, initial_indent="      ", subsequent_indent="      "))
