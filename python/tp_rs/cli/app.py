"""The root of the command, its exit codes, and errors as one paragraph each."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import tp_rs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BAD_INPUT", "DOES_NOT_FIT", "INTERRUPTED", "OK", "app", "reported"]

OK, DOES_NOT_FIT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes. 130 is what a shell gives a program that Ctrl-C ended."""

_log = logging.getLogger("tp_rs")

app = typer.Typer(
    name="tp-rs",
    help="Tensor parallelism in one process, over devices that need not match.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tp-rs {tp_rs.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell on stderr what is looked at and assumed.")
    ] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")


@contextmanager
def reported() -> Iterator[None]:
    """Turn what is raised inside into one paragraph on stderr and an exit code."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except tp_rs.DoesNotFit as error:
        _fail(_sentence(error), DOES_NOT_FIT, error)
    except (tp_rs.TPError, OSError) as error:
        _fail(_sentence(error), BAD_INPUT, error)
    except KeyboardInterrupt as error:
        _fail("interrupted", INTERRUPTED, error)
    except Exception as error:  # noqa: BLE001 - torch's and transformers' errors are of any type
        _fail(f"{type(error).__name__}: {_sentence(error)} (tp-rs -v ... shows where)", BAD_INPUT, error)


def _fail(sentence: str, code: int, error: BaseException) -> NoReturn:
    _log.debug("the error was raised here:", exc_info=error)
    typer.echo(f"tp-rs: {sentence}", err=True)
    raise typer.Exit(code) from error


def _sentence(error: Exception) -> str:
    """One paragraph for a person at a terminal."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file; MODEL is a file or folder on this machine"
    return " ".join(str(error).split())
