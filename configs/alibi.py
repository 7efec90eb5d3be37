"""Linear biases on the logits (Press et al. 2022)."""

position = "alibi"
