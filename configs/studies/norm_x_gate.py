"""A factorial that nobody has run: norm placement x a gate on the attention's output."""

question = "Does a gate take sinks, spikes or both away, and does that depend on the norm's place?"
common = {"bos": True}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("gate", "Sink_1"), ("gate", "top1/median"), ("post", "Sink_1")]
arms = {
    "pre": "prenorm",
    "post": "postnorm",
    "sandwich": "sandwich",
    "gate": "gate_head",
    "post+gate": "postnorm gate_head",
    "sandwich+gate": "sandwich gate_head",
}
hypotheses = ["H2"]
