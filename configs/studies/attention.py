"""Attention: what its rows sum to, a place to park it, and gates on its output."""

question = "Which attention needs no sink, and do its spikes go too?"
common = {"bos": True}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("sigmoid", "Sink_1"), ("gate_head", "Sink_1"), ("gate_head", "top1/median")]
arms = {
    "softmax": "prenorm",
    "softmax1": "softmax1",
    "sink_logit": "sink_logit",
    "k_bias": "kbias",
    "kv_bias": "kvbias",
    "clipped": "clipped",
    "sigmoid": "sigmoid",
    "relu": "relu_attention",
    "registers": "registers",
    **{f"gate_{kind}": f"gate_{kind}" for kind in ("channel", "head", "single", "constant", "position", "token")},
}
published = {
    "softmax": (10.1, 46.0, 3818),
    "gate_channel": (10.0, 4.5, 202),
    "gate_head": (10.1, 6.4, 186),
    "gate_single": (10.2, 31.2, 316),
    "gate_constant": (None, 42.2, 1922),
    "gate_position": (None, 41.1, 1755),
    "gate_token": (None, 31.1, 1966),
}
