"""Instruments for massive activations ("spikes") and attention sinks: observe, measure, intervene, report."""

__version__ = "0.1.0"
