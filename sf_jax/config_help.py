"""The configuration part of `python -m sf_jax.train --help`: variants, fields, types and defaults."""

import dataclasses
import importlib.util
import inspect
import re
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import flags

from sf_jax import usage
from sf_jax.config import TrainConfig, from_dict

SHIPPED = ("configs/digits.py", "configs/wan_distill.py")


def of_arguments(arguments: Sequence[str]) -> str:
    """The help text for the configuration on a command line; without one, for those in the repository.

    Raises:
      SystemExit: if the configuration cannot be read, with a one-line message.
    """
    path = _value("config", arguments)
    if path is None:
        parts = [
            f"{shipped} has the variants {', '.join(_variants(load(shipped)))}."
            for shipped in SHIPPED
            if Path(shipped).is_file()
        ]
        return "\n\n".join([*parts, f"--config={SHIPPED[0]} --help lists the variants and fields of a configuration."])
    try:
        return text_of(path)
    except Exception as error:  # a configuration is a program, which can raise anything
        from sf_jax.command import fail

        fail(f"config is {path}: {error}")


def _value(name: str, arguments: Sequence[str]) -> str | None:
    """The value of a flag on a command line that may otherwise be invalid."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            return value if equals else next(iter(arguments[index + 1 : index + 2]), None)
    return None


def load(path: str) -> types.ModuleType:
    """Imports a configuration file as a module.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if its name does not end in .py.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is a folder" if path and Path(path).is_dir() else f"{path} does not exist")
    spec = importlib.util.spec_from_file_location("sf_jax_config", path)
    if spec is None:
        raise ValueError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(config: str) -> Mapping:
    """The configuration that a file returns; the file is a program and can raise anything.

    Args:
      config: the file, optionally with `:VARIANT`, the argument of its `get_config`.

    Raises:
      ValueError: if it cannot be read, with a one-line message.
    """
    path, colon, variant = config.partition(":")
    try:
        module = load(path)
        if not callable(getattr(module, "get_config", None)):
            raise ValueError("it has no function get_config, which returns the configuration")
        values = module.get_config(*([variant] if colon else []))
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise ValueError(f"{error.filename or path}{line}: {error.msg}") from error
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        if not isinstance(error, (ValueError, OSError)):
            text = f"{path}{_line(error, path)}: {type(error).__name__}: {text}"
        raise ValueError(text if path in text else f"{path}: {text}") from error
    if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
        raise ValueError(f"{path}: get_config returns {type(values).__name__}, it must return a ConfigDict")
    return values


def _line(error: BaseException, path: str) -> str:
    """The line of a file that raised an error; empty if the error was raised elsewhere."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""


class ConfigParser(flags.ArgumentParser):
    """Parses the flag --config."""

    syntactic_help = "a configuration file"

    def parse(self, argument: str) -> Mapping:
        """Reads the configuration and locks it, so that setting an unknown field raises an error."""
        values = read(argument)
        if hasattr(values, "lock"):
            values.lock()
        return values

    def flag_type(self) -> str:
        """The type's name in --help."""
        return "config object"


def text_of(config: str) -> str:
    """Describes the variants and fields of a configuration.

    Args:
      config: its file, optionally with `:VARIANT` to show that variant's values.
    """
    path, _, variant = config.partition(".py:")
    path = f"{path}.py" if variant else path
    values = read(config)  # raises if the file is invalid
    module = load(path)
    variants = _variants(module)
    lines = [inspect.getdoc(module) or "", ""] if module.__doc__ else []
    if variants:
        lines += [f"Variants, as --config={path}:VARIANT:"]
        lines += [line for name, doc in variants.items() for line in usage.entry(name, doc)] + [""]
    lines += [f"Fields and what they are in {config}:"]
    for name, kind, value, doc in fields_of(from_dict(values)):
        lines += usage.entry(f"--config.{name}={value}", f"({kind}) {doc}")
    return "\n".join(lines)


def _variants(module: types.ModuleType) -> dict[str, str]:
    """The variants' names and the first paragraphs of their docstrings."""
    variants = getattr(module, "VARIANTS", {})
    if not isinstance(variants, Mapping):
        return {}
    return {
        name: (inspect.getdoc(make) or "").partition("\n\n")[0].replace("\n", " ") for name, make in variants.items()
    }


def fields_of(config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields name, type, value and description of every field of a config dataclass, including nested groups."""
    docs, hints = attribute_docs(type(config)), typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{name}.")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            yield name, _kind(hints[field.name]), shown, docs.get(field.name, "")


def _kind(hint) -> str:
    """A short name of a field's type."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_kind(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"several {_kind(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        group = next(
            (field.name for field in dataclasses.fields(TrainConfig) if field.type in (hint, hint.__name__)), ""
        )
        return f"fields as {group}" if group else hint.__name__
    return "None" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def attribute_docs(kind: type) -> dict[str, str]:
    """Descriptions of a dataclass's fields, from the `Attributes` section of its docstring."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    docs, name = {}, None
    for line in section.splitlines():
        if match := re.match(r"  (\w+): (.*)", line):
            name = match[1]
            docs[name] = match[2]
        elif name and line.startswith("    "):
            docs[name] += f" {line.strip()}"
        elif not line.startswith("  "):
            break
    return docs
