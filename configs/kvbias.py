"""A learned key with a learned value (Gu et al. 2024)."""

attention = "kv_bias"
