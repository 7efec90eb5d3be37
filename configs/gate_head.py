"""Attention output gated per head by the input."""

gate = "head"
