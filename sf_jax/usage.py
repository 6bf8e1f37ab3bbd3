"""The text of --help: a command's description, and its flags in groups."""

import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence

from absl import flags

OTHERS = "Other flags"
EVERYWHERE = "--help, --version, --helpfull (flags of libraries, too), --flagfile=FILE (flags from a file)"
COMMON = ("help", "helpshort", "helpfull", "helpxml", "version")
_COLUMN = 28  # column where the descriptions of flags begin
_TYPES = {"int": "NUMBER", "float": "NUMBER", "path": "PATH", "comma separated list of strings": "A,B,...", "": "TEXT"}


def module_name(main: Callable[[], None]) -> str:
    """The full name of the module of a command's `main`, even if it runs as a script."""
    if main.__module__ != "__main__":
        return main.__module__
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else "__main__"


def describe(main: Callable[[], None], values: flags.FlagValues, groups: Mapping[str, Sequence[str]]) -> str:
    """Describes a command and its flags.

    Args:
      main: the command.
      values: its flags; those of libraries are omitted.
      groups: section titles and the flags in each. Flags in no group come last, in a section of their own.

    Returns:
      The text, as wide as the terminal.
    """
    name = module_name(main)
    own = {}
    for module, module_flags in values.flags_by_module_dict().items():
        if module in (sys.argv[0], main.__module__) or module.startswith("sf_jax."):
            own |= {flag.name: flag for flag in module_flags if flag.name not in COMMON}
    named = {flag for names in groups.values() for flag in names}
    sections = [(title, [own[flag] for flag in names if flag in own]) for title, names in groups.items()]
    sections.append((OTHERS if groups else "Flags", [flag for flag in own.values() if flag.name not in named]))
    script = f"sf-jax {name.rpartition('.')[2]}" if name.startswith("sf_jax.") else name
    lines = [f"usage: {script} --FLAG=VALUE ...    (or python -m {name})", ""]
    lines += [inspect.getdoc(sys.modules[main.__module__]) or "", ""]
    for title, section in sections:
        if section:
            lines += [f"{title}:", *(line for flag in section for line in _flag(flag)), ""]
    return "\n".join([*lines, f"For every command: {EVERYWHERE}"])


def _flag(flag: flags.Flag) -> Iterable[str]:
    """The lines of a flag."""
    if flag.boolean:
        left = f"--{flag.name}"
    else:
        allowed = getattr(flag.parser, "enum_values", None)
        kind = "|".join(allowed) if allowed else _TYPES.get(flag.flag_type(), "TEXT")
        left = f"--{flag.name}={kind}"
    text = re.sub(r"^<.*?>: ", "", " ".join((flag.help or "").split()))  # absl adds an enum's values there
    if flag.default not in (None, False, []) and not flag.boolean:
        text += f" (default: {flag.default})"
    return entry(left, text)


def entry(left: str, text: str) -> list[str]:
    """A name and its description in two columns, as lines as wide as the terminal."""
    width = min(120, max(60, shutil.get_terminal_size((100, 24)).columns))
    space = " " * _COLUMN
    lines = textwrap.wrap(text, width, initial_indent=space, subsequent_indent=space) or [space]
    if len(left) + 4 <= _COLUMN:
        return [f"  {left}".ljust(_COLUMN) + lines[0][_COLUMN:], *lines[1:]]
    return [f"  {left}", *(lines if text else [])]
