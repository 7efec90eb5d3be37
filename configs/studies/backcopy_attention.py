"""Attention on the synthetic task of the positive control: which kinds leave its idle head without a sink?"""

question = "Which attention does the bigram-backcopy task leave without a sink, and where does its residual peak go?"
scale = "backcopy"
common = {"max_iters": 1000}
seeds = [1, 2, 3]
arms = {
    "softmax": "prenorm",
    "softmax1": "softmax1",
    "sink_logit": "sink_logit",
    "k_bias": "kbias",
    "kv_bias": "kvbias",
    "clipped": "clipped",
    "sigmoid": "sigmoid",
    "relu": "relu_attention",
    "gate_head": "gate_head",
    "gate_channel": "gate_channel",
    "sgd": "sgd",
}
