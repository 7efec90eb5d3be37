"""One size above scale/micro: 2.7M parameters beside the embeddings, 33M tokens, about an hour of one CPU core."""

dataset = "simplewiki"
bos = True
norm = "rmsnorm"
position = "rope"
ffn = "gated"
activation = "silu"
n_layer = 6
n_head = 6
n_embd = 192
block_size = 64
batch_size = 64
gradient_accumulation_steps = 1
max_iters = 8000
learning_rate = 6.7e-4
min_lr = 6.7e-5
lr_schedule = "wsd"
warmup_iters = 100
eval_interval = 500
eval_iters = 20
log_interval = 10
save_interval = 500
