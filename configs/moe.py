"""Mixture of gated experts: 2 of 8 for each token, with a load-balance loss (Jiang et al. 2024; Fedus et al. 2022)."""

ffn = "moe"
losses = {"load_balance": 0.01}
