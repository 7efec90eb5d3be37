"""Sigmoid attention, without normalisation (Ramapuram et al. 2024)."""

attention = "sigmoid"
