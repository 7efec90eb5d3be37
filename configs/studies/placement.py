"""Parts 2 and 3 of studies/PLAN.md: pre-norm against post-norm, each at the rate that rates.py found for it."""

question = "Do spike and sink fall on the same token in post-norm too, and is its spike as large?"
scale = "scale/micro"
common = {"bos": True, "dtype": "bfloat16"}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("post", "P(sink | spike)"), ("post", "top1/median"), ("post", "Sink_1")]
arms = {
    "pre": {"learning_rate": 0.002, "min_lr": 0.0002},
    "post": {"configs": "postnorm", "learning_rate": 0.002, "min_lr": 0.0002},
}
ablations = ["spike_zero", "spike_mean", "spike_scale", "spike_direction", "sink_mask"]
hypotheses = ["H2", "H3"]
