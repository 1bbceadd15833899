"""The command line: ``megavlm train``, ``prepare``, ``eval``, ``chat``, ``serve`` and the other subcommands.

A command's work lies in a module of its own (:mod:`megavlm.commands`), imported only when it runs, so that wrong
input is refused, and help printed, before torch is loaded. Wrong input costs one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from megavlm import __version__, garbage
from megavlm.config.errors import (
    FAILED,
    WRONG_INPUT,
    MachineError,
    OtherRankError,
    RecipeError,
    UsageError,
    for_users,
    speaker_of,
)
from megavlm.parallel.processes import children_end_with_us

_COMMANDS = {
    "init": "write a recipe for a model and a data set of your own",
    "train": "train a model by a recipe",
    "prepare": "turn conversation JSON and images into a data set for training",
    "render-text": "render pages of text in English and Chinese, to train reading",
    "inspect": "show prepared data as it will be trained, on a page of HTML",
    "convert": "bring weights in from Hugging Face, take them out, list and verify them",
    "upcycle": "turn the MLPs of a checkpoint into experts",
    "models": "list the families of models, and what was proven of each",
    "plan": "pick the layout for a number of GPUs, and predict memory and time",
    "eval": "score a checkpoint on a benchmark",
    "generate": "answer one prompt, with pictures",
    "chat": "talk with a checkpoint: several turns and pictures",
    "serve": "answer over HTTP as OpenAI's API does, with a web page",
    "doctor": "read a run's directory and say what happened",
    "quickstart": "train a tiny model on generated images, on this machine",
}
"""What there is, each in the module of its name in :mod:`megavlm.commands`."""

_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EBUSY,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE, errno.EMFILE, errno.ENFILE,
    errno.ENOMEM, errno.ENOBUFS,
}  # fmt: skip
TRACEBACK = "MEGAVLM_TRACEBACK"
"""Environment variable: set it to 1 to see where an error for users was raised."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that all errors for users look the same."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: that of the process) and return the exit code."""
    if argv is None:
        garbage.seldom()
    words = list(sys.argv[1:] if argv is None else argv)
    children_end_with_us()
    try:
        command = _top_parser().parse_args(words[:1]).command
        return _run(command, words[1:])
    except (ValueError, FileNotFoundError) as error:
        if not for_users(error):
            raise
        return _report(error, WRONG_INPUT)
    except MachineError as error:
        return _report(error, FAILED)
    except OtherRankError as error:
        _tell_torchrun([str(error)], error.exit_code)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.errno not in _MACHINE or words[0] == "train":  # a run of many ranks wants to see where
            raise
        return _report(error, FAILED)


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, _COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{text}" for name, text in _COMMANDS.items())
    parser = _Parser(
        prog="megavlm",
        usage="megavlm [-h] [--version] command ...",
        description="A Megatron-style 3D-parallel trainer for vision-language models.",
        epilog=f"commands:\n{listing}\n\nmegavlm <command> --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megavlm {__version__}")
    parser.add_argument("command", choices=tuple(_COMMANDS), help="what to do", metavar="command")
    return parser


def _run(command: str, words: Sequence[str]) -> int:
    """Run a command, whose module brings its own arguments."""
    module = importlib.import_module(f"megavlm.commands.{command.replace('-', '_')}")
    text = _COMMANDS[command]
    parser = _Parser(prog=f"megavlm {command}", description=f"{text.capitalize()}.", allow_abbrev=False)
    module.add_arguments(parser)
    intermixed = getattr(module, "INTERMIXED", False)
    args = parser.parse_intermixed_args(words) if intermixed else parser.parse_args(words)
    _configure_logging()
    run: Callable[..., int] = module.run
    return run(args)


def _configure_logging() -> None:
    """Log progress on the first rank of a job, and warnings on the others and of the libraries."""
    level = logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megavlm").setLevel(level)
    # Megatron-Core calls collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _report(error: BaseException, exit_code: int) -> int:
    """Print ``error`` for the user, once per job, leave it where torchrun looks for it, and return the exit code."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        lines = [f"{error.filename}: no such file or directory"]
    elif isinstance(error, OSError) and error.strerror is not None:
        lines = [f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror]
    else:
        lines = str(error).splitlines() or [type(error).__name__]
    # torchrun ends the other ranks as soon as one has left: whoever has taken the word says it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        if _speaks(error, lines):
            for line in lines:
                print(f"megavlm: error: {line}", file=sys.stderr, flush=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _tell_torchrun(lines, exit_code)
    return exit_code


def _speaks(error: BaseException, lines: Sequence[str]) -> bool:
    """Whether this rank is the one that tells the user.

    Once the ranks have met, they have agreed on it. Before, those of one torchrun ask a directory that they share; on
    its other machines, and under other launchers, nobody knows what the first rank has seen: an error of files is then
    said once for each machine, and one of the recipe, which is the same everywhere, by the first rank.
    """
    rank, error_file = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_ERROR_FILE")
    speaker = speaker_of(error)
    if speaker is not None:
        return speaker == rank
    same_everywhere = isinstance(error, RecipeError | UsageError)
    if error_file and (os.environ.get("GROUP_RANK", "0") == "0" or not same_everywhere):
        name = f"megavlm-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"
        try:
            # .../attempt_0/<local rank>/error.json
            (Path(error_file).parent.parent / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return rank == 0
        return True
    return rank == 0 or (not same_everywhere and os.environ.get("LOCAL_RANK") == "0")


def _tell_torchrun(lines: Sequence[str], exit_code: int) -> None:
    """Leave the error where torchrun looks for it; its report shows the call stack, which here is none of a bug."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return
    stack = f"no traceback, as this is no bug: megavlm's own line says what is wrong (exit code {exit_code})"
    extra = {"py_callstack": stack, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(error_file).write_text(json.dumps({"message": {"message": "; ".join(lines), "extraInfo": extra}}))


if __name__ == "__main__":
    sys.exit(main())
