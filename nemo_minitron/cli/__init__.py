"""The `minitron` command, a file for each subcommand: it reads options, calls `commands` or `job`, prints a result."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from nemo_minitron.cli.cache_logits import cache_logits
from nemo_minitron.cli.chat import chat
from nemo_minitron.cli.compensate import compensate
from nemo_minitron.cli.compress import compress
from nemo_minitron.cli.convert import convert
from nemo_minitron.cli.distill import distill
from nemo_minitron.cli.estimate import estimate
from nemo_minitron.cli.evaluate import evaluate
from nemo_minitron.cli.finetune import finetune
from nemo_minitron.cli.options import with_options
from nemo_minitron.cli.plan import plan
from nemo_minitron.cli.prune import prune
from nemo_minitron.cli.push import push
from nemo_minitron.cli.rank_tokens import rank_tokens
from nemo_minitron.cli.recipes import recipes
from nemo_minitron.cli.report import doctor, report
from nemo_minitron.cli.rotate import rotate
from nemo_minitron.cli.serving import serving
from nemo_minitron.errors import DISK, InputError, visible
from nemo_minitron.hosts import host_name
from nemo_minitron.schema import OUTPUT
from nemo_minitron.settings.host import HOST

VERSION = "Print the version."
COMPLETING = "_MINITRON_COMPLETE"  # set by the shell's function that `--install-completion` writes
COMMANDS: tuple[Callable[..., None], ...] = (
    compress, rotate, estimate, rank_tokens, plan, compensate, prune, distill, cache_logits, finetune, evaluate,
    convert, chat, push, serving, report, recipes, doctor,
)  # fmt: skip


def _version(asked: bool) -> None:
    """Prints the version and ends the command."""
    if asked:
        print(f"minitron {metadata.version('nemo_minitron')}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help=VERSION)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. It may stand anywhere.")] = False,
    host: Annotated[str, typer.Option(help="What runs models: nemo or bridge. It may stand anywhere.")] = "",
) -> None:
    """The options of every command; `main` reads them."""


def _take_host(arguments: list[str]) -> list[str]:
    """Sets MINITRON_HOST, which this process and its workers read, from `--host NAME`. Returns the other arguments."""
    left: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--host" or word.startswith("--host="):
            os.environ[HOST] = word.partition("=")[2] if "=" in word else next(words, "")
        else:
            left.append(word)
    return left


class Command(TyperCommand):
    """A command whose `--help` comes last, in the last panel."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = OUTPUT
        return option


def _app(commands: Iterable[Callable[..., None]]) -> typer.Typer:
    app = typer.Typer(
        help="Makes trained language models smaller: score, cut, distil (NVIDIA's Minitron method), in NeMo 2 or "
        "Megatron-Bridge.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for command in commands:
        app.command(cls=Command)(command)
    return app


def _titles() -> Iterator[Callable[..., None]]:
    """The commands without their options, for the list of commands: building options takes a tenth of the start."""
    for command in COMMANDS:

        def title() -> None: ...

        title.__name__, title.__doc__ = command.__name__, command.__doc__
        yield title


def __getattr__(name: str) -> typer.Typer:
    """`app`: all commands with their options."""
    if name != "app":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _app(with_options(command) for command in COMMANDS)


def main() -> None:
    """The entry point. A refusal is one sentence on stderr and exit code 2; a failure has exit code 1. Tracebacks are
    shown with --debug only.

    Ctrl-C and SIGTERM end the command and all its processes, with exit codes 130 and 143.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    arguments = _take_host(arguments)
    if not debug:
        _quiet()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and a script's background ignore signals on purpose
            signal.signal(number, _leave)
    named = [command for command in COMMANDS if [command.__name__.replace("_", "-")] == arguments[:1]]
    if COMPLETING in os.environ:  # the shell asks for words, which may be the options of any command
        named = list(COMMANDS)
    try:
        if os.environ.get(HOST):
            host_name()
        _app([with_options(command) for command in named] or _titles())(arguments)
    except (InputError, OSError, RuntimeError) as error:
        if debug:
            raise
        failed = isinstance(error, RuntimeError)
        if isinstance(error, OSError) and error.errno in DISK:
            failed, error = True, OSError(f"'{error.filename or 'a file'}' could not be written: {error.strerror}")
        elif isinstance(error, OSError) and error.filename and error.strerror:
            error = OSError(f"'{error.filename}' could not be read or written: {error.strerror}")
        print(f"minitron: {visible(str(error))}", file=sys.stderr)
        sys.exit(1 if failed else 2)


def _leave(number: int, frame: object) -> None:
    """Ends by an exception, so that processes are ended on the way out. A second signal ends at once."""
    signal.signal(number, signal.SIG_DFL)
    print("minitron: interrupted; run the same command again to resume", file=sys.stderr)
    sys.exit(128 + number)


def _quiet() -> None:
    """Silences the libraries' warnings about what is not installed; `minitron doctor` reports that."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("megatron", "nemo", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
