"""A learned key without value (Gu et al. 2024)."""

attention = "k_bias"
