"""The text that comes with every Python, as bytes: topics of the language reference, docstrings, comments, then source.

  python data/stdlib/prepare.py [--megabytes=8]

This needs no network and takes seconds. Prose comes first, so that a small limit takes only prose. The same Python
version gives the same bytes. In every version the same twentieth of topics and modules, chosen by name, is validation.
Tokens are bytes, and id 256 is BOS.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.writer import DatasetWriter
from spikesink.errors import Flags, cli
from spikesink.text.default_text import ABOUT, MEGABYTES, VAL_EVERY, documents, split_of
from spikesink.text.tokenizers import ByteTokenizer


def prepare(megabytes: float = MEGABYTES) -> None:
    """Writes train.bin, val.bin and meta.json beside this file."""
    with DatasetWriter(FOLDER, ByteTokenizer(), val_every=VAL_EVERY) as writer:
        texts = list(documents(megabytes))
        for split in ("train", "val"):
            writer.add((text for name, text in texts if split_of(name) == split), split)
        writer.finish(**ABOUT)


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--megabytes", type=float, default=MEGABYTES, help="amount of text")
    prepare(flags.parse_args().megabytes)


if __name__ == "__main__":
    cli(main)
