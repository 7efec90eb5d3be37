"""Part 5 of studies/PLAN.md: pre-norm against post-norm one size up. Four seeds: estimates, no test."""

question = "Does what placement.py found at 0.3M parameters hold at 2.7M?"
scale = "scale/octave"
common = {"bos": True, "dtype": "bfloat16"}
seeds = [1, 2, 3, 4]
arms = {"pre": "prenorm", "post": "postnorm"}
ablations = ["spike_zero", "spike_mean", "spike_scale", "spike_direction", "sink_mask"]
