"""Logits capped at +-30 by tanh (Gemma 2)."""

logit_cap = 30.0
