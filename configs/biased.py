"""Biases in linear layers and norms, as in GPT-2."""

bias = True
