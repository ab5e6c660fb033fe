"""Completion on the tab key: `eval "$(crosslace completion bash)"`, the same for zsh; `... fish | source` for fish.

The shell asks `crosslace complete LINE` for what could stand at the line's end; nothing heavy is imported for that.
"""

from pathlib import Path

from ...conf import SECTIONS, VERBS
from ...conf.describe import known_settings, presets
from ...data.errors import UserError
from .flags import FLAGS

SCRIPTS = {
    "bash": r"""_crosslace() {
  local IFS=$'\n' line="${COMP_LINE:0:$COMP_POINT}"
  local word="${line##* }"
  COMPREPLY=($(crosslace complete "$line"))
  if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}"); fi
}
complete -o nospace -o default -F _crosslace crosslace
""",
    "zsh": r"""_crosslace() {
  local -a found
  found=(${(f)"$(crosslace complete "${BUFFER[1,CURSOR]}")"})
  compadd -Q -S '' -- $found
}
compdef _crosslace crosslace
""",
    "fish": "complete -c crosslace -a '(crosslace complete (commandline -cp | string collect))'\n",
}


def script(shell: str) -> str:
    """What a shell must know."""
    if shell not in SCRIPTS:
        raise UserError(f"completion for {shell or 'no shell'} is not known; it takes one of {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def candidates(line: str) -> list[str]:
    """What could stand at the end of a command line that was typed so far."""
    words = line.split(" ")
    typed, before = words[-1], [word for word in words[1:-1] if word]
    if not before:
        return [name for name in (*VERBS, "help", "completion") if name.startswith(typed)]
    verb = before[0]
    if verb == "help":
        return [name for name in VERBS if name.startswith(typed)]
    if verb not in VERBS:
        return []
    return [word for word in _of_verb(verb, typed) if word.startswith(typed)]


def _of_verb(verb: str, typed: str) -> list[str]:
    known, own = known_settings(verb), [Path("conf")]
    group, equals, _ = typed.partition("=")
    if not equals:
        groups = [name for name in ("experiment", *VERBS[verb].sections) if presets(name, own)]
        return [f"{name}=" for name in (*known, *groups)] + [flag for flag in FLAGS if typed.startswith("-")]
    if group in SECTIONS or group == "experiment":
        return [f"{group}={name}" for name in presets(group, own)]
    if group in known and known[group].type == "bool":
        return [f"{group}=true", f"{group}=false"]
    return []
