"""Prepares what the scripts of a page read: the examples of each part, and plotly, once and compressed."""

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

CAPTIONS = {  # of the interactive figures; the still ones have captions of their own
    "text": (
        "The text, token by token. You choose what the colour shows: magnitudes, on a log scale, or attention, on a "
        "linear one. Point at a token, tap it or use the arrow keys to read its numbers. ␣ is a space, ⏎ a new line."
    ),
    "matrix": (
        "|h| of every token and channel in the first sequence, after the layer that you choose. Drag to turn it. In a "
        "model of many channels, neighbouring channels share a column, which shows the largest of them; the most "
        "extreme channels have columns of their own. Colour: |h| divided by the layer's median, on a log scale."
    ),
}


def live(name: str, examples: ExamplesEntry | None) -> dict[str, Any] | None:
    """Returns what the interactive figures of one part need; None if the findings hold no text of it."""
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
    """Returns plotly.js as gzip in base64. A page inflates it when its 3-D figure comes into view."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
