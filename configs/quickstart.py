"""Two pre-norm layers on the text of Python's documentation. A spike on BOS grows within minutes on a CPU."""

dataset = "stdlib"
bos = True
n_layer = 2
n_head = 2
n_embd = 128
block_size = 64
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 4000
learning_rate = 4e-3
min_lr = 4e-4
lr_schedule = "wsd"
warmup_iters = 100
eval_interval = 500
eval_iters = 20
log_interval = 10
save_interval = 1000
dtype = "float32"
compile = False
