"""Differential attention: pairs of heads are subtracted, then normed (Ye et al. 2024)."""

head_out = "differential"
