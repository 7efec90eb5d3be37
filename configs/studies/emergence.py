"""The time course: when do spikes come, when sinks, and when do they meet?"""

question = "Which comes first, spike or sink, and from when on do they fall on the same tokens?"
common = {"bos": True, "max_iters": 8000}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("post", "Sink_1"), ("sandwich", "top1/median")]
arms = {"pre": "prenorm", "post": "postnorm", "sandwich": "sandwich"}
hypotheses = ["H2"]
points = 40
ablations = []
