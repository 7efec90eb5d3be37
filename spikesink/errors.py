"""A mistake of the user ends in one line on stderr and exit code 2. Any other error is a traceback."""

import argparse
import contextlib
import difflib
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake that the user can mend; the message names what is wrong and what to do."""

    exit_code = 2
    everywhere = False  # True if every rank raises it: then rank 0 alone prints it


class StoppedError(UserError):
    """A run stopped itself (a non-finite loss). It is no mistake in the command, so the exit code differs."""

    exit_code = 3
    everywhere = True


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns ' (did you mean X?)' with the known name closest to `name`, or '' if none is close."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


@functools.cache
def say_once(text: str) -> None:
    """Prints a line on stderr. The same line is printed only once."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns an ImportError in the block into a UserError that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error.name} is missing here: pip install 'spikesink[{name}]'") from None


def no_device(name: object, error: BaseException) -> UserError:
    """The UserError for a device that torch would not use."""
    message = str(error).splitlines()[0]
    known = {"Expected one of": "torch has no such device", "Could not run": "this PyTorch was built without it"}
    reason = next((words for start, words in known.items() if message.startswith(start)), message)
    return UserError(f"device {name} is not available: {reason}; cpu always works")


class InterruptedRunError(UserError):
    """A run was asked to stop, and has saved its state."""

    exit_code = 130
    everywhere = True


class Flags(argparse.ArgumentParser):
    """An argparse parser that raises UserError for a bad flag and names the nearest one. It prints no usage line, as
    the description says how to call the script."""

    def __init__(self, **kwargs: Any) -> None:
        form = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=22)
        super().__init__(usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=form, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Argparse calls this for every mistake it finds."""
        raise UserError(f"{message}; --help shows how" if "required" in message or "expected" in message else message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parses like argparse. Raises UserError."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            names = [option.lstrip("-") for option in known]
            hint = nearest(unknown[0].split("=")[0].lstrip("-"), names).replace("mean ", "mean --")
            if not unknown[0].startswith("-") and "--compare" in known:
                hint = "; several checkpoints side by side: --compare A B"
            raise UserError(f"unknown argument {unknown[0]}{hint or '; --help lists them'}")
        return parsed


def cli(main: Callable[[], None]) -> None:
    """Runs a script's `main()`. A UserError becomes one line on stderr, and sets the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # show each line at once, and survive an ASCII terminal
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        code = exit_code(main)
    except Exception:
        if not distributed:
            raise
        traceback.print_exc()
        code = 1
    if distributed:  # skip the destructor of gloo's process group, which can wait for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def out_of_memory(error: BaseException) -> bool:
    """True for the errors that Python, and torch on a CPU or a GPU, raise when memory runs out."""
    message = str(error)
    return isinstance(error, MemoryError) or "not enough memory" in message or "out of memory" in message


def exit_code(main: Callable[[], None]) -> int:
    """Runs `main()` and returns its exit code. A failure is printed on stderr."""
    try:
        if sys.platform == "win32":
            raise UserError("this runs on Linux and macOS; on Windows, call it in WSL (Windows Subsystem for Linux)")
        main()
    except UserError as error:
        if not error.everywhere or os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        cut_off = re.search(r"(\S+)/\w\w/\S+\.so: file too short", str(error))
        if cut_off:  # a run that was killed while it compiled
            print(f"error: torch.compile's cache is damaged: delete {cut_off[1]}, and run this again", file=sys.stderr)
            return UserError.exit_code
        if not out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:120] or type(error).__name__
        hint = "a smaller --batch_size or shorter sequences; in training, raise --gradient_accumulation_steps to match"
        print(f"error: out of memory ({message}): take {hint}", file=sys.stderr)
        return UserError.exit_code
    except BrokenPipeError:  # the program that reads our output has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
