"""What changes when it cannot?    python ablate.py CHECKPOINT [--flag ...]

  python ablate.py out/quickstart                        all interventions
  python ablate.py out/quickstart --only spike_zero      one, with its controls
  python ablate.py gpt2 --only sink_mask --no-probes     of the Hugging Face hub

Spikes and sinks removed in 16 ways, each beside matched controls: what they
do to the loss, where, whether one needs the other, what int8 costs; with
data/blimp and data/ud_ewt prepared, also what they do to grammar and to what
can be read off the states. Writes ablate.json, detect.json (what there is on
the same text) and report.html, a page with both, beside the checkpoint.
"""

import sys

from detect import LAB
from spikesink import commands
from spikesink.errors import cli


def main() -> None:
    commands.ablate(sys.argv[1:], __doc__, LAB)


if __name__ == "__main__":
    cli(main)
