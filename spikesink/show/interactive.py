"""What the scripts of a page work on: the examples of a part as they are shown, and plotly, once, compressed."""

import base64
import functools
import gzip
from dataclasses import replace
from typing import Any

from plotly.offline import get_plotlyjs

from ..measure.findings import ExamplesEntry
from ..measure.sinks import PRIMARY_SINK_EPSILON
from ..schema import to_json
from .figures import best_layer, largest_matrix
from .text import visible

CAPTIONS = {  # of the figures that answer; the still ones have their own
    "text": (
        "The text, token by token. Choose what colours it; point at a token, tap it, or go through them with the arrow "
        "keys for its numbers. ␣ is a space, ⏎ a new line. Colour on a log scale for magnitudes, linear for attention."
    ),
    "matrix": (
        "|h| of every token and channel of the first sequence, after the layer that you choose; drag to turn it. Where "
        "there are many channels, neighbouring ones are shown by their largest, and the most extreme stand alone. "
        "Colour: |h| over the layer's median, on a log scale."
    ),
}


def live(name: str, examples: ExamplesEntry | None) -> dict[str, Any] | None:
    """What a page needs to make the figures of one part answer; None where nothing was kept of its text."""
    if examples is None:
        return None
    matrices = examples.matrices
    sequences = [replace(s, texts=[visible(text) for text in s.texts]) for s in examples.sequences]
    return {
        "id": name,
        "data_id": f"examples-{name}",
        "captions": CAPTIONS,
        "data": {
            **to_json(replace(examples, sequences=sequences)),
            "best_layer": best_layer(examples),
            "best_matrix": matrices.index(largest_matrix(examples)[0]) if matrices else None,
            "epsilon": PRIMARY_SINK_EPSILON,
        },
    }


@functools.cache
def plotly() -> str:
    """plotly.js, gzip in base64: a page inflates it when the 3-D figure comes into view."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
