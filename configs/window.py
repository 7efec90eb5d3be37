"""Sliding window: each query sees 64 keys."""

window = 64
