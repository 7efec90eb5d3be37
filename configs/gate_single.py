"""Attention output gated by a single number, computed from the input."""

gate = "single"
