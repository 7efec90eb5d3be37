"""Clipped softmax, which gives exact zeros (Bondarenko et al. 2023)."""

attention = "clipped"
