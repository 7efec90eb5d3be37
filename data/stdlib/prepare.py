"""The text that comes with every Python: language reference topics, docstrings, comments, then source; as bytes.

  python data/stdlib/prepare.py [--megabytes=8]

Needs no network and takes seconds. Prose comes first, so a small limit keeps prose only. The same Python version
gives the same bytes. Byte-level, id 256 is BOS; every 20th document is validation.
"""

import ast
import io
import pydoc_data.topics
import sys
import sysconfig
import tokenize
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.tokenizer import ByteTokenizer
from data.writer import DatasetWriter, progress
from spikesink.errors import Flags, run

# not part of the documented library, or different from machine to machine
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def sources():
    """Text of every module of the standard library, in the order of its path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in progress(sorted(root.rglob("*.py")), desc="standard library"):
        parts = path.relative_to(root).parts
        if not (LEFT_OUT & set(parts) or parts[0].startswith("config-") or path.name.startswith("_sysconfigdata")):
            yield path.read_text(encoding="utf-8", errors="replace")


def docstrings(source):
    """The docstrings of a module, joined."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes))
    return "\n\n".join(text for text in found if text)


def comments(source):
    """The comments of a module, one a line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)


def documents():
    """Prose first: reference topics, docstrings, comments; then the source itself."""
    yield from (text for _, text in sorted(pydoc_data.topics.topics.items()))
    modules = list(sources())
    for extract in (docstrings, comments, str):
        for source in modules:
            try:
                text = extract(source)
            except (SyntaxError, tokenize.TokenError):
                continue
            if text.strip():
                yield text


def prepare(megabytes=8):
    """Writes train.bin, val.bin and meta.json beside this file."""
    limit, taken = megabytes * 2**20, 0
    with DatasetWriter(FOLDER, ByteTokenizer(), val_every=20) as writer:
        kept = []
        for text in documents():
            if taken >= limit:
                break
            kept.append(text)
            taken += len(text.encode("utf-8", "replace"))
        writer.add(kept)
        writer.finish(python=sys.version.split()[0])


def main():
    flags = Flags(description=__doc__)
    flags.add_argument("--megabytes", type=float, default=8, help="how much text to take")
    prepare(flags.parse_args().megabytes)


if __name__ == "__main__":
    run(main)
