"""Softmax-off-by-one: an extra key with logit 0 and value 0 (Miller 2023)."""

attention = "softmax1"
