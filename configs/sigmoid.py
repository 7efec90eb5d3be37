"""Sigmoid attention, no normalisation (Ramapuram et al. 2024)."""

attention = "sigmoid"
