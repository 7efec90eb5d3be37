"""A factorial that nobody has run: norm placement x optimiser."""

question = "Is it the optimiser or the norm's place that makes spikes and sinks, and do they add up?"
common = {"bos": True}
seeds = [1, 2, 3, 4, 5, 6, 7, 8]
contrasts = [("muon", "top1/median"), ("sgd", "top1/median"), ("sgd", "Sink_1")]
arms = {
    "pre": "prenorm",
    "post": "postnorm",
    "sandwich": "sandwich",
    "muon": "muon",
    "sgd": "sgd",
    "post+muon": "postnorm muon",
    "post+sgd": "postnorm sgd",
    "sandwich+muon": "sandwich muon",
    "sandwich+sgd": "sandwich sgd",
}
hypotheses = ["H2"]
