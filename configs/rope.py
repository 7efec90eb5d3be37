"""RoPE: rotary positions (Su et al. 2021)."""

position = "rope"
