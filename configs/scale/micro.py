"""A Llama of 0.3M parameters: on text, a sink and a spike on BOS grow within minutes on one CPU core.

The text is Simple English Wikipedia with the first merges of GPT-2's BPE. At this size, bytes give no sink.
  python data/text/prepare.py --name=simplewiki --vocab=2048 simplewiki.txt
"""

dataset = "simplewiki"
bos = True
norm = "rmsnorm"
position = "rope"
ffn = "gated"
activation = "silu"
n_layer = 4
n_head = 4
n_embd = 64
block_size = 64
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 8000
learning_rate = 4e-3
min_lr = 4e-4
lr_schedule = "wsd"
warmup_iters = 100
eval_interval = 500
eval_iters = 20
log_interval = 10
save_interval = 1000
