"""About 10M parameters without the embeddings: an hour or two on a CPU, minutes on a GPU."""

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
eval_interval = 250
eval_iters = 20
log_interval = 10
save_interval = 500
