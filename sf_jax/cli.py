"""The console script: `sf-jax COMMAND --FLAG=VALUE ...` is `python -m sf_jax.COMMAND --FLAG=VALUE ...`."""

import difflib
import runpy
import sys

COMMANDS = {
    "generate": "video from a prompt",
    "warm": "compile what generate needs, before it is needed",
    "serve": "a page and a server for endless video",
    "train": "train a stage of a recipe, or continue a run",
    "prepare": "prompts and videos -> data for training at Wan's size",
    "evaluate": "compare models of moving digits with each other and with real clips",
    "convert": "weights -> other names, number types or containers",
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: sf-jax COMMAND --FLAG=VALUE ...", "", *lines, "", "sf-jax COMMAND --help lists a command's flags."]
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs a command as `python -m sf_jax.COMMAND` would.

    Args:
      arguments: the command line without the program's name; None is that of the process.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "-help", "help"):
        print(usage())
        return
    if name in ("--version", "-version", "version"):
        from sf_jax.command import versions

        print(versions())
        return
    if name not in COMMANDS:
        from sf_jax.command import fail

        close = difflib.get_close_matches(name[:40], COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        fail(f"sf-jax has no command {name!r}: {hint}")
    sys.argv = [f"sf-jax {name}", *rest]
    runpy.run_module(f"sf_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
