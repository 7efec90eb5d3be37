"""Sliding window: a query sees 64 keys."""

window = 64
