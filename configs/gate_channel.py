"""Attention output gated per channel by the input (Qiu et al. 2025; Sun et al. 2026)."""

gate = "channel"
