"""Levers on the one, to see the other: attention that needs no sink, a stream that allows no spike, and both."""

question = "Do spikes stay when sinks are made needless, and sinks when spikes are forbidden?"
common = {"bos": True}
seeds = [1, 2, 3, 4, 5, 6, 7, 8]
contrasts = [("gate", "Sink_1"), ("gate", "top1/median"), ("clip", "Sink_1"), ("clip", "top1/median")]
# against sinks: gate, sigmoid, slot; against spikes: clip, penalty
arms = {
    "baseline": "prenorm",
    "gate": "gate_head",
    "sigmoid": "sigmoid",
    "slot": "kvbias",
    "clip": "stream_clip",
    "penalty": "kurtosis_penalty",
    "gate+clip": "gate_head stream_clip",
    "gate+penalty": "gate_head kurtosis_penalty",
}
