"""Beside studies/PLAN.md, written before its runs: part 5's rate was scaled and not chosen. Does that decide it?"""

question = "Would pre-norm and post-norm at 2.7M parameters look alike at twice the rate?"
scale = "scale/octave"
common = {"bos": True, "dtype": "bfloat16"}
seeds = [1, 2]
arms = {
    f"{norm}_{rate:g}": {"configs": f"{norm}norm", "learning_rate": rate, "min_lr": rate / 10}
    for rate in (6.7e-4, 13.4e-4)
    for norm in ("pre", "post")
}
ablations = ["spike_zero", "spike_mean", "spike_scale", "spike_direction", "sink_mask"]
