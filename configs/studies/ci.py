"""A tiny study for the tests, in seconds: tests/test_study.py compares it with results/ci/table.json."""

question = "Does the engine give the table that it gave before?"
scale = "backcopy"
common = {"n_embd": 32, "block_size": 32, "batch_size": 16, "max_iters": 60, "warmup_iters": 10, "learning_rate": 1e-2}
seeds = [1, 2]
contrasts = [("post", "loss")]
arms = {"pre": "prenorm", "post": "postnorm"}
hypotheses = ["H1", "H2", "H3", "H4", "H5", "H6", "H7"]
points = 2
n_seq = 12
seq_len = 32
