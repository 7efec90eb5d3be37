"""Norm placement: the project's own question. RMSNorm throughout, so that arms differ in where it stands."""

question = "Does norm placement decide whether spikes and sinks fall on the same tokens?"
scale = "scale/nano"
common = {"bos": True, "norm": "rmsnorm"}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("post", "Sink_1"), ("post", "top1/median"), ("post", "P(sink | spike)"), ("none", "Sink_1")]
arms = {
    "pre": "prenorm",
    "post": "postnorm",
    "none": "nonorm",
    "sandwich": "sandwich",
    "output": "output",
    "qk": "qk_full",
    "qk+output": "qk_output",
    "dyt": "dyt",
}
hypotheses = ["H1", "H2", "H3", "H4", "H5", "H6"]
probes = True
published = {
    "pre": (10.1, 46.0, 3818),
    "sandwich": (9.8, 44.7, 520),
    "qk+output": (10.0, 42.0, 92),
    "dyt": (10.0, 61.0, 153),
}
