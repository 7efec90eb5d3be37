"""A learned key with value 0 (Gu et al. 2024)."""

attention = "k_bias"
