"""Part 2 of studies/PLAN.md, before it: which learning rate suits pre-norm, and which post-norm? By the loss alone."""

question = "At which learning rate does each norm placement train best?"
scale = "scale/micro"
common = {"bos": True, "dtype": "bfloat16"}
seeds = [101, 102]  # in no test
arms = {
    f"{norm}_{rate:g}": {"configs": f"{norm}norm", "learning_rate": rate, "min_lr": rate / 10}
    for norm in ("pre", "post")
    for rate in (1e-3, 2e-3, 4e-3, 8e-3)
}
points = 1
ablations = []
