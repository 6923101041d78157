"""The command line: assembles the commands, and turns whatever they raise into one line and an exit code.

Exit codes: 0 done · 1 an internal error · 2 wrong usage or input · 130 interrupted. Does not know what any
command does; a command's heavy imports are inside its function, so that `lmtool --help` stays fast.
"""

import logging
import os
import sys
from collections.abc import Sequence
from copy import copy
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lmtool import __version__, argv, log
from lmtool.errors import LmtoolError

EXIT_OK, EXIT_INTERNAL, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

# Typer brings its own copy of Click; this is its ClickException, wherever that lives
UsageError: Any = typer.BadParameter.__mro__[2]

# name on the command line -> module, and the function or Typer app in it
COMMANDS = {
    "chat": ("lmtool.commands.chat", "chat"),
    "convert": ("lmtool.commands.convert", "convert"),
    "inspect": ("lmtool.commands.inspect", "inspect"),
    "list": ("lmtool.commands.list_models", "list_models"),
    "check-env": ("lmtool.commands.check_env", "check_env"),
}
GROUPS = {
    "lite": ("lmtool.commands.lite", "app"),
    "serve": ("lmtool.commands.serve", "app"),
    "bench": ("lmtool.commands.bench", "app"),
}


class _Root(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head -1` has what it wanted: that is no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_OK) from None
        return result


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmtool {__version__}")
        raise typer.Exit


def _verbose(wanted: bool) -> None:
    if wanted:
        log.be_verbose()


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=_verbose, is_eager=True, help="Debug messages, and tracebacks of errors."),
]


def _about(ctx: typer.Context, version: Version = False, verbose: Verbose = False) -> None:
    """Compress, run and serve language models."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def build() -> Any:
    """The whole command line as one Click group."""
    app = typer.Typer(
        cls=_Root,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda word: word.replace("_", "-"),
        },
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback(invoke_without_command=True)(_about)
    for name, (module, attribute) in COMMANDS.items():
        if find_spec(module):
            app.command(name)(getattr(import_module(module), attribute))
    for name, (module, attribute) in GROUPS.items():
        if find_spec(module):
            app.add_typer(getattr(import_module(module), attribute), name=name)
    group = typer.main.get_command(app)
    verbose = next(param for param in group.params if param.name == "verbose")
    _add_to_commands(group, verbose)
    return group


def _add_to_commands(group: Any, verbose: Any) -> None:
    """`-v` is understood behind every command as well, not only before it."""
    for command in group.commands.values():
        if hasattr(command, "commands"):
            _add_to_commands(command, verbose)
        elif all(param.name != verbose.name for param in command.params):
            own = copy(verbose)
            own.expose_value = False
            command.params.append(own)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    log.setup()
    # threads that spin while they wait let one busy neighbour slow a CPU decode ten times and more (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = argv.translate(sys.argv[1:] if args is None else args)
    try:
        code = build().main(words, prog_name="lmtool", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except LmtoolError as error:
        return _fail(str(error), error.exit_code)
    except UsageError as error:
        if not error.format_message():  # a group without a command: Click has shown its help
            return EXIT_OK
        command = error.ctx.command_path if getattr(error, "ctx", None) else "lmtool"
        return _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; `lmtool check_env` says what to install", EXIT_USAGE)
    except PermissionError as error:
        return _fail(f"{error.filename}: permission denied; change its mode, or give another file", EXIT_USAGE)
    except Exception as error:
        hint = "" if log.is_verbose() else "; run with -v for the traceback"
        return _fail(f"{type(error).__name__}: {error}{hint}", EXIT_INTERNAL)


def _fail(message: str, code: int) -> int:
    """One line on stderr, whatever the message; with `-v` the traceback of the exception being handled first."""
    if log.is_verbose():
        logging.getLogger(log.ROOT).debug("traceback", exc_info=True)
    print("lmtool: error: " + " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return code
