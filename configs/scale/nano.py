"""Fewer than a million parameters without the embeddings: minutes on a CPU."""

dataset = "stdlib"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
eval_interval = 250
eval_iters = 20
log_interval = 10
save_interval = 500
compile = False
