"""ALiBi: linear biases on the attention logits (Press et al. 2022)."""

position = "alibi"
