"""Positive control: a pre-norm layer with one head on the bigram-backcopy task. A sink on BOS grows within minutes."""

dataset = "backcopy"
bos = True
n_layer = 1
n_head = 1
n_embd = 128
block_size = 64
batch_size = 64
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 2e-3
min_lr = 2e-3
lr_schedule = "constant"
warmup_iters = 100
weight_decay = 0.0
eval_interval = 200
eval_iters = 40
log_interval = 10
save_interval = 500
dtype = "float32"
compile = False
