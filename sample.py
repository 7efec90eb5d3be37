"""What does it say?    python sample.py CHECKPOINT --prompt TEXT [--flag ...]

  python sample.py out/quickstart --prompt "The cat"     a run of train.py
  python sample.py gpt2 --prompt "The cat" --top_k 50    of the Hugging Face hub
  python sample.py gpt2 --prompt "The cat" --with spike_zero

Continues a text, token by token. --with NAME, an intervention of ablate.py,
continues it again under that, with the same seed, and says what broke. Opens
what detect.py opens, but for models that do not predict the next token.
"""

import sys

from detect import LAB
from spikesink import commands
from spikesink.errors import cli


def main() -> None:
    commands.sample(sys.argv[1:], __doc__, LAB)


if __name__ == "__main__":
    cli(main)
