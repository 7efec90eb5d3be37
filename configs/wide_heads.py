"""Heads 128 wide (Sun et al. 2026)."""

head_dim = 128
