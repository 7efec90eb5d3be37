"""Gated FFN with GELU (Shazeer 2020)."""

ffn = "gated"
