"""Part 4 of studies/PLAN.md, before it: which limit on the stream takes the spike away? See the manipulation check."""

question = "How low must the stream be clipped for the spike to go?"
scale = "scale/micro"
common = {"bos": True, "dtype": "bfloat16", "learning_rate": 0.002, "min_lr": 0.0002}
seeds = [101, 102]  # in no test
arms = {"clip_8": {"stream_clip": 8.0}, "clip_4": {"stream_clip": 4.0}, "clip_2": {"stream_clip": 2.0}}
points = 1
ablations = []
