"""What a user did wrong is one line on stderr and exit code 2; everything else is a traceback."""

import argparse
import contextlib
import difflib
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake that the user can mend; the message names what is wrong and what to do."""

    exit_code = 2
    everywhere = False  # of several ranks all raise it, and rank 0 says it


class StoppedError(UserError):
    """A run that stopped itself (a non-finite loss): not a mistake in the command, so another exit code."""

    exit_code = 3
    everywhere = True


def nearest(name: object, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known name closest to `name`, or ''."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


@functools.cache
def say_once(text: str) -> None:
    """A line on stderr, once."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Within, a package that is not there is a UserError that names the extra which installs it."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error.name} is missing here: pip install 'spikesink[{name}]'") from None


def no_device(name: object, error: BaseException) -> UserError:
    """The UserError for a device that torch would not use."""
    said = str(error).splitlines()[0]
    known = {"Expected one of": "torch knows no such kind", "Could not run": "this PyTorch was built without it"}
    reason = next((words for start, words in known.items() if said.startswith(start)), said)
    return UserError(f"device {name} is not at hand: {reason}; cpu always is")


class InterruptedRunError(UserError):
    """A run that was asked to stop, and saved itself."""

    exit_code = 130
    everywhere = True


class Flags(argparse.ArgumentParser):
    """argparse, with UserError for a bad flag and the nearest known one named; the description says how to call it."""

    def __init__(self, **kwargs: Any) -> None:
        form = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=22)
        super().__init__(usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=form, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Argparse calls this for every mistake it finds."""
        raise UserError(f"{message}; --help shows how" if "required" in message or "expected" in message else message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """As argparse's. Raises UserError."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            words = {option.lstrip("-"): option for option in known}
            hint = nearest(unknown[0].split("=")[0].lstrip("-"), words).replace("mean ", "mean --")
            if not unknown[0].startswith("-") and "--compare" in known:
                hint = "; several checkpoints side by side: --compare A B"
            raise UserError(f"unknown argument {unknown[0]}{hint or '; --help lists them'}")
        return parsed


def cli(main: Callable[[], None]) -> None:
    """Runs a script's `main()`; a UserError becomes one line on stderr and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a log file shows each line as it comes; an ASCII terminal, what it can
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        code = exit_code(main)
    except Exception:
        if not one_of_many:
            raise
        traceback.print_exc()
        code = 1
    if one_of_many:  # without the destructor of gloo's process group, which can wait for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def out_of_memory(error: BaseException) -> bool:
    """True for what Python, torch on a CPU and torch on a GPU raise where memory is short."""
    said = str(error)
    return isinstance(error, MemoryError) or "not enough memory" in said or "out of memory" in said


def exit_code(main: Callable[[], None]) -> int:
    """Runs `main()` and says on stderr how it ended, if not well."""
    try:
        if sys.platform == "win32":
            raise UserError("this runs on Linux and macOS: on Windows call it in WSL, the Linux within Windows")
        main()
    except UserError as error:
        if not error.everywhere or os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:120] or type(error).__name__
        hint = "a smaller --batch_size, or shorter sequences; training keeps its step with more"
        print(f"error: out of memory ({said}): take {hint} --gradient_accumulation_steps", file=sys.stderr)
        return UserError.exit_code
    except BrokenPipeError:  # the reader of a pipe had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
