"""OpenWebText (Skylion007/openwebtext, 8,013,769 documents) as GPT-2 tokens: about 9.0B train, 4.5M val.

  python data/openwebtext/prepare.py [--max_docs=N] [--parquet=DIR] [--bpe=gpt2.tiktoken]

The result needs about 17 GiB of disk. The 24 GiB download is streamed shard by shard, only the tokens are stored, and
memory stays under 1 GiB. After an interruption the same command continues after the last complete shard. Every 2000th
document is validation, as in nanoGPT. --parquet reads local shards instead of the hub, and --column names their column
of text, if it is not "text". Documents without text are left out.
"""

import itertools
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.archive import hub_files, parquet_files, parquet_texts
from data.writer import DatasetWriter, identities, progress
from spikesink.errors import Flags, UserError, cli
from spikesink.text.tokenizers import GPT2Tokenizer

NAME, CONFIG, REVISION = "Skylion007/openwebtext", "plain_text", "79d93d786212f7344586290adb811d4ae6a1762c"
ROWS = 8_013_769
VAL_EVERY = 2000


def prepare(
    folder: Path,
    tokenizer: GPT2Tokenizer,
    max_docs: int | None = None,
    parquet: str | None = None,
    column: str = "text",
) -> None:
    """Writes {train,val}.bin and meta.json to `folder`.

    Raises UserError if the hub's dataset does not have ROWS documents.
    """
    files = parquet_files(parquet, column=column) if parquet else hub_files(NAME, CONFIG, "train", REVISION)
    shard_ids = identities(files) if parquet else files
    settings = {"source": str(parquet or REVISION), "max_docs": max_docs, "shards": shard_ids, "column": column}
    with DatasetWriter(folder, tokenizer, VAL_EVERY, settings) as writer:
        for done, shard in enumerate(progress(files, desc="shards")):
            if done < writer.source:
                continue
            remaining = None if max_docs is None else max_docs - writer.documents
            writer.add(itertools.islice(parquet_texts([shard], column), remaining))
            writer.mark(done + 1)
            if max_docs is not None and writer.documents >= max_docs:
                break
        count = writer.documents + writer.empty
        if parquet is None and max_docs is None and count != ROWS:
            raise UserError(f"{NAME} gave {count:,} documents, not {ROWS:,}: not the dataset that was asked for")
        writer.finish(source=NAME if parquet is None else "local parquet", revision=settings["source"])


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--max_docs", type=int, help="stop after this many documents")
    flags.add_argument("--parquet", help="folder of local parquet shards")
    flags.add_argument("--column", default="text", help="the column of the local shards with the text")
    flags.add_argument("--bpe", help="local file of GPT-2's BPE ranks, if tiktoken cannot download them")
    args = flags.parse_args()
    if args.max_docs is not None and args.max_docs < 2:
        raise UserError(f"--max_docs={args.max_docs} must be at least 2")
    prepare(FOLDER, GPT2Tokenizer(args.bpe), args.max_docs, args.parquet, args.column)


if __name__ == "__main__":
    cli(main)
