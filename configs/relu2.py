"""Squared ReLU in the FFN (So et al. 2021)."""

activation = "relu2"
