"""Clipped softmax: exact zeros (Bondarenko et al. 2023)."""

attention = "clipped"
