"""Instruments for massive activations ("spikes") and attention sinks, in any trained checkpoint.

  spikesink detect gpt2                          what does it do?
  spikesink ablate gpt2 --only sink_mask         what changes when it cannot?
  spikesink sample gpt2 --prompt "The cat"       what does it say?
  spikesink export out/x/ckpt.pt DIR             a checkpoint as a Hugging Face folder
  spikesink COMMAND --help                       the flags of a command
  spikesink --version

A checkpoint of train.py needs the model.py that made it: that of the clone in
whose folder this is called, or --model path/to/model.py. nanoGPT's ckpt.pt and
Hugging Face models need none.
"""

import sys
from collections.abc import Callable

from . import __version__, commands
from .errors import UserError, cli, nearest

DETECT = """What does this checkpoint do?    spikesink detect CHECKPOINT [--flag ...]

  spikesink detect gpt2                                  of the Hugging Face hub
  spikesink detect model.gguf                            a GGUF file
  spikesink detect path/to/folder --prompt "The cat."    one text, by token
  spikesink detect --compare A B                         side by side

Massive activations and attention sinks, in one streaming pass. Reads
checkpoints of train.py, nanoGPT and transformers, and GGUF files. Writes
detect.json and detect.html beside the checkpoint, or here for the hub's.
"""
ABLATE = """What changes when it cannot?    spikesink ablate CHECKPOINT [--flag ...]

  spikesink ablate gpt2                                  all interventions
  spikesink ablate gpt2 --only spike_zero --no-probes    one, with its controls

Spikes and sinks removed, each removal beside matched controls. Writes
ablate.json, detect.json and report.html, a page with both.
"""
EXPORT = """A checkpoint as a Hugging Face folder.    spikesink export CHECKPOINT DIR [--flag ...]

Writes config.json, model.safetensors and, where there is one, the tokenizer.
For the arms that GPT-2 or Llama compute; others are refused with the reason.
The logits are compared with those of the model.py that made the checkpoint.
"""
SAMPLE = """What does it say?    spikesink sample CHECKPOINT --prompt TEXT [--flag ...]

  spikesink sample gpt2 --prompt "The cat" --top_k 50
  spikesink sample gpt2 --prompt "The cat" --with spike_zero    what breaks?

Continues a text, token by token; --with NAME again under an intervention of
ablate's, with the same seed.
"""
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "detect": lambda argv: commands.detect(argv, DETECT),
    "ablate": lambda argv: commands.ablate(argv, ABLATE),
    "sample": lambda argv: commands.sample(argv, SAMPLE),
    "export": lambda argv: commands.export(argv, EXPORT),
}


def main() -> None:
    """Calls the command that is named. Raises UserError."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
    elif name == "--version":
        print(f"spikesink {__version__}")
    elif name in COMMANDS:
        COMMANDS[name](argv)
    else:
        raise UserError(f"there is no command {name!r}{nearest(name, COMMANDS) or ': ' + ', '.join(COMMANDS)}")


def console() -> None:
    """The console script."""
    cli(main)


if __name__ == "__main__":
    console()
