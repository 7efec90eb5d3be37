"""The text that comes with every Python: language reference topics, docstrings, comments, then source; as bytes.

  python data/stdlib/prepare.py [--megabytes=8]

Needs no network and takes seconds. Prose comes first, so a small limit keeps prose only. The same Python version
gives the same bytes; in every version the same twentieth of topics and modules, by name, is validation. Byte-level, id
256 is BOS.
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
        found = list(documents(megabytes))
        for split in ("train", "val"):
            writer.add((text for name, text in found if split_of(name) == split), split)
        writer.finish(**ABOUT)


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--megabytes", type=float, default=MEGABYTES, help="how much text to take")
    prepare(flags.parse_args().megabytes)


if __name__ == "__main__":
    cli(main)
