"""GPT-2 small with about 124M parameters, which are the defaults."""

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
