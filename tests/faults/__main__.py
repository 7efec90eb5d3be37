"""A long run of the faults, and its table: python -m tests.faults --n 100 [--only WORDS] [--write FILE.md]"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from spikesink import files
from train import provenance

from .scenarios import FAULTS
from .world import make_worlds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="how often a fault of chance is repeated")
    parser.add_argument("--only", default="", help="faults that have these words in their name")
    parser.add_argument("--write", type=Path, help="the table, as Markdown")
    args = parser.parse_args()
    rows, failed, since, commit = [], 0, time.monotonic(), provenance()["git_commit"][:12]
    with tempfile.TemporaryDirectory() as folder:
        fresh = make_worlds(folder)
        for name in tqdm([name for name in FAULTS if args.only in name], desc="faults", disable=None):
            times, messages, outcome = 0, set(), "not run: needs a tmpfs"
            try:
                for world in FAULTS[name](fresh, args.n):
                    times, outcome = times + 1, "as it should be"
                    messages |= set(world.messages)
            except Exception as error:
                outcome, failed = f"**FAILED**: {type(error).__name__} {' '.join(str(error).split())}", failed + 1
            rows.append((name, times, outcome, sorted(messages)))
    table = table_of(rows)
    print(table)
    if args.write:
        about = (
            f"`python -m tests.faults --n {args.n}`, {time.monotonic() - since:,.0f} s, torch {torch.__version__}, "
            f"{platform.machine()}, commit {commit}"
        )
        text = f"{(Path(__file__).parent / 'table.md').read_text()}\n{about}\n\n{table}\n"
        files.write_atomic(args.write, lambda file: file.write(text.encode()))
    raise SystemExit(1 if failed else 0)


def table_of(rows):
    """Markdown of (fault, times, outcome, messages)."""
    lines = ["| fault | times | outcome | what it said |", "| --- | ---: | --- | --- |"]
    for name, times, outcome, messages in rows:
        lines.append(f"| {name} | {times} | {outcome} | {f'`{messages[0]}`' if messages else 'nothing'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
