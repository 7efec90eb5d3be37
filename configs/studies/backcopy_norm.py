"""Norm placement on the synthetic task of the positive control, where a sink on BOS comes within minutes."""

question = "Which norm placements let the bigram-backcopy task grow a sink, and a spike on the same token?"
scale = "backcopy"
common = {"norm": "rmsnorm", "max_iters": 1000}
seeds = [1, 2, 3]
arms = {
    "pre": "prenorm",
    "post": "postnorm",
    "none": "nonorm",
    "sandwich": "sandwich",
    "output": "output",
    "qk": "qk_full",
    "qk+output": "qk_output",
    "dyt": "dyt",
}
hypotheses = ["H2", "H5", "H6"]
