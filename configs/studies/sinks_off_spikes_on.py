"""Levers on the one, to see the other: attention that needs no sink, a stream that allows no spike, and both."""

question = "Do spikes stay when sinks are made needless, and sinks when spikes are forbidden?"
common = {"dataset": "stdlib", "bos": True}
seeds = [1, 2, 3]
arms = {
    "neither": "prenorm",
    "sinks off: gate": "gate_head",
    "sinks off: sigmoid": "sigmoid",
    "sinks off: slot": "kvbias",
    "spikes off: clip": "stream_clip",
    "spikes off: penalty": "kurtosis_penalty",
    "gate and clip": "gate_head stream_clip",
    "gate and penalty": "gate_head kurtosis_penalty",
}
