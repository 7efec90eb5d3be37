"""The optimiser and its settings, about a learning rate of 2e-3, the nano scale's (the paper's: 3e-4)."""

question = "Do spikes and sinks depend on the optimiser?"
common = {"bos": True, "learning_rate": 2e-3, "min_lr": 2e-4, "weight_decay": 0.1}
seeds = [1, 2, 3, 4, 5, 6, 7, 8]
contrasts = [("muon", "kurtosis"), ("sgd", "kurtosis"), ("decay_0", "Sink_1")]
arms = {
    "adamw": "prenorm",
    "muon": "muon",
    "sgd": "sgd",
    "lr_quarter": {"learning_rate": 5e-4, "min_lr": 5e-5},
    "lr_double": {"learning_rate": 4e-3, "min_lr": 4e-4},
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
