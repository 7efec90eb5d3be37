"""Without norms, at which learning rate does training diverge, and does it with them?"""

question = "At which learning rate does a model without norms diverge, and at which step?"
scale = "scale/toy"
seeds = [1, 2, 3]
arms = {  # times that scale's 4e-3
    "none_x1": "nonorm",
    "none_x4": {"configs": "nonorm", "learning_rate": 1.6e-2, "min_lr": 1.6e-2},
    "none_x16": {"configs": "nonorm", "learning_rate": 6.4e-2, "min_lr": 6.4e-2},
    "none_x64": {"configs": "nonorm", "learning_rate": 0.256, "min_lr": 0.256},
    "pre_x1": "prenorm",
    "pre_x4": {"learning_rate": 1.6e-2, "min_lr": 1.6e-2},
    "pre_x16": {"learning_rate": 6.4e-2, "min_lr": 6.4e-2},
    "pre_x64": {"learning_rate": 0.256, "min_lr": 0.256},
}
