"""Instruments for massive activations ("spikes") and attention sinks: open a model, detect, ablate, edit.

import spikesink

with spikesink.open("gpt2", n_seq=20) as look:
    findings = spikesink.detect(look)
    with spikesink.spike_zero(look):
        print(look.loss())
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
# ruff: noqa: F403, F405  # names of api.py, which is imported when one of these is first asked for
__all__ = ["Look", "Monitor", "MonitorCallback", "Options", "Sampling", "UserError"]
__all__ += ["ablate", "detect", "edited", "figures", "open", "page", "sample"]
__all__ += ["spike_clip", "spike_constant", "spike_direction", "spike_mean", "spike_project", "spike_scale"]
__all__ += ["bos_ffn", "bos_remove", "sink_damp", "sink_mask", "sink_null", "sink_relocate"]
__all__ += ["remove_sink_heads", "remove_step_up", "spike_stepup", "spike_zero"]

if TYPE_CHECKING:
    from .api import *
    from .api import Monitor, MonitorCallback, Options, Sampling, UserError  # which api.py imports itself


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
