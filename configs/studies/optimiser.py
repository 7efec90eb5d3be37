"""The optimiser and its settings, about the nano scale's learning rate of 2e-3 (the paper's: 3e-4)."""

question = "Do spikes and sinks depend on the optimiser?"
common = {"bos": True}
seeds = [1, 2, 3]
arms = {
    "adamw": "prenorm",
    "muon": "muon",
    "sgd": "sgd",
    "lr_quarter": {"learning_rate": 5e-4},
    "lr_double": {"learning_rate": 4e-3},
    "decay_0": "nodecay",
    "decay_half": {"weight_decay": 0.5},
    "beta2_999": "beta2",
}
published = {
    "adamw": (10.1, 46.0, 3818),
    "lr_quarter": (11.8, 18.6, 1447),
    "lr_double": (10.0, 51.5, 3773),
    "decay_0": (10.4, 33.8, 12275),
    "beta2_999": (10.7, 20.9, 1855),
}
