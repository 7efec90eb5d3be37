"""Gated FFN with SiLU at the plain FFN's parameter count (Shazeer 2020)."""

ffn = "gated"
activation = "silu"
