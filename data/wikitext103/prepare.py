"""WikiText-103, raw (Salesforce/wikitext): about 118M GPT-2 tokens of Wikipedia, with its own validation split.

  python data/wikitext103/prepare.py [--parquet=DIR] [--bpe=gpt2.tiktoken]

A document is an article, which starts at a top-level heading " = Title = ". --parquet reads local shards instead of the
hub, named train-*.parquet and validation-*.parquet.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.archive import hub_files, parquet_files, parquet_texts
from data.writer import DatasetWriter, progress
from spikesink.errors import Flags, cli
from spikesink.text.tokenizers import GPT2Tokenizer

NAME, CONFIG = "Salesforce/wikitext", "wikitext-103-raw-v1"
HEADING = re.compile(r" = [^=].* = \n")


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Joins lines to articles."""
    article: list[str] = []
    for line in lines:
        if HEADING.fullmatch(line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def prepare(folder: Path, tokenizer: GPT2Tokenizer, parquet: str | None = None) -> None:
    """Writes {train,val}.bin and meta.json to `folder`."""
    with DatasetWriter(folder, tokenizer, val_every=1) as writer:
        for source, split in (("validation", "val"), ("train", "train")):
            files = parquet_files(parquet, f"{source}-*.parquet") if parquet else hub_files(NAME, CONFIG, source)
            writer.add(progress(articles(parquet_texts(files)), desc=source, unit=" articles"), split)
        writer.finish(source=NAME)


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--parquet", help="folder of local parquet shards")
    flags.add_argument("--bpe", help="local file of GPT-2's BPE ranks, if tiktoken cannot download them")
    args = flags.parse_args()
    prepare(FOLDER, GPT2Tokenizer(args.bpe), args.parquet)


if __name__ == "__main__":
    cli(main)
