"""GPT-2 small, about 124M parameters: the defaults."""

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
