"""Biases in linear layers and norms, as GPT-2 has."""

bias = True
