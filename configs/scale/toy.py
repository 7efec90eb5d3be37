"""Two layers on the bigram-backcopy task: a sink and a spike on BOS grow within a few minutes on one CPU core."""

dataset = "backcopy"
bos = True
norm = "rmsnorm"
n_layer = 2
n_head = 1
n_embd = 128
block_size = 64
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 1500
learning_rate = 4e-3
min_lr = 4e-3
lr_schedule = "constant"
warmup_iters = 100
weight_decay = 0.0
eval_interval = 150
eval_iters = 10
log_interval = 10
save_interval = 500
