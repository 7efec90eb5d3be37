"""The FFN: its activation, gated or plain, linear, or attention in its place."""

question = "Do spikes and sinks depend on the FFN and its activation?"
common = {"bos": True, "ffn": "plain", "activation": "gelu"}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("swiglu", "top1/median"), ("relu", "top1/median"), ("linear", "top1/median"), ("linear", "Sink_1")]
arms = {
    "gelu": "prenorm",
    **{arm: arm for arm in ("relu", "relu2", "silu", "tanh", "identity", "geglu", "swiglu", "linear")},
    "attention": "attention_ffn",
}
hypotheses = ["H7"]
published = {
    "gelu": (10.1, 69.3, 3369),
    "swiglu": (10.1, 46.0, 3818),
    "linear": (12.5, 58.9, 688),
    "attention": (10.8, 73.9, 637),
}
