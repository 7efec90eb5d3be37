"""What does this checkpoint do?    python detect.py CHECKPOINT [--flag ...]

  python detect.py out/quickstart                        a run of train.py
  python detect.py gpt2                                  of the Hugging Face hub
  python detect.py model.gguf                            a GGUF file
  python detect.py out/quickstart --prompt "The cat."    one text, by token
  python detect.py out/quickstart --data wikitext103     on other text
  python detect.py --compare out/prenorm out/postnorm    side by side

Massive activations and attention sinks, in one streaming pass. Reads
checkpoints of train.py, nanoGPT and transformers, and GGUF files; nothing in
them is executed. Writes detect.json and detect.html beside the checkpoint.
"""

import sys
from pathlib import Path

from data.loader import Tokens
from model import CONTRACT, GPT
from spikesink import commands
from spikesink.errors import UserError, cli
from spikesink.models.lab import Lab


def split(name: str, block_size: int, bos: bool = False) -> Tokens:
    """The validation split of a dataset of data/, or of a folder. Raises UserError."""
    try:
        return Tokens(name, "val", block_size, bos)
    except UserError as error:
        raise UserError(f"{error}. Another text: --data=FOLDER, or --text=FILE") from None


LAB = Lab(GPT.from_checkpoint, split, Path(__file__).resolve().parent / "data", CONTRACT)


def main() -> None:
    commands.detect(sys.argv[1:], __doc__, LAB)


if __name__ == "__main__":
    cli(main)
