"""The optimiser and its settings, about the nano scale's learning rate of 2e-3 (the paper's: 3e-4)."""

question = "Do spikes and sinks depend on the optimiser?"
common = {"dataset": "stdlib", "bos": True}
seeds = [1, 2, 3]
arms = {
    "adamw": "prenorm",
    "muon": "muon",
    "sgd": "sgd",
    "lr / 4": {"learning_rate": 5e-4},
    "lr x 2": {"learning_rate": 4e-3},
    "decay 0": "nodecay",
    "decay 0.5": {"weight_decay": 0.5},
    "beta2 0.999": "beta2",
}
published = {
    "adamw": (10.1, 46.0, 3818),
    "lr / 4": (11.8, 18.6, 1447),
    "lr x 2": (10.0, 51.5, 3773),
    "decay 0": (10.4, 33.8, 12275),
    "beta2 0.999": (10.7, 20.9, 1855),
}
