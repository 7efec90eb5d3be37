"""Without norms, at which learning rate does training diverge, and does it with them?"""

question = "At which learning rate does a model without norms diverge, and at which step?"
scale = "scale/toy"
seeds = [1, 2, 3]
_rates = {"x4": 1.6e-2, "x16": 6.4e-2, "x64": 0.256}  # times that scale's 4e-3
arms = {
    "none_x1": "nonorm",
    **{f"none_{x}": {"configs": "nonorm", "learning_rate": rate, "min_lr": rate} for x, rate in _rates.items()},
    "pre_x1": "prenorm",
    **{f"pre_{x}": {"learning_rate": rate, "min_lr": rate} for x, rate in _rates.items()},
}
