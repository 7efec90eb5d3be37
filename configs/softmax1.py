"""Softmax-off-by-one: a key of logit 0 and no value (Miller 2023)."""

attention = "softmax1"
