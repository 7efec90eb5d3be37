"""Can the spikes of a checkpoint be trained away? --init_from=CHECKPOINT for another than the quickstart's.

Every arm takes the same steps on the same batches as plain fine-tuning (`none`), with a new optimiser, at the learning
rate at which the checkpoint's run ended; data and all other settings are that run's, but for what is said here or on
the command line: --max_iters, --learning_rate, --penalty_weight (of the penalty arm), --clip (in medians),
--arms=none,gate.
"""

question = "Can the spikes be trained away, and what is int8 like then?"
scale = ""  # the checkpoint's
# it warms up because the optimiser's state is new
common = {"init_from": "out/quickstart/ckpt.pt", "max_iters": 600, "warmup_iters": 60, "compile": False}
seeds = [1, 2, 3, 4, 5, 6, 7, 8]
contrasts = [("clip", "int8 per tensor: loss"), ("penalty", "int8 per tensor: loss"), ("gate", "top1/median")]
arms = {
    "none": {},
    "clip": {"stream_clip": "medians"},  # for good, after every sub-layer, at --clip=10 times the largest median |h|
    "penalty": {"penalty": "kurtosis"},  # He et al. 2405.19279
    "gate": {"gate": "head"},  # Qiu et al. 2505.06708; it starts as the same function
}
penalty_weight = 0.01
points = 5
ablations = []
int8 = True
