"""A second attention in place of the FFN (Sun et al. 2026)."""

ffn = "attention"
