"""Attention output gated by one number of the input."""

gate = "single"
