"""Part 4 of studies/PLAN.md: a gate that takes sinks, and a clip that takes the spike (see its manipulation check)."""

question = "Do sinks stay when the stream allows no spike, and spikes when a gate makes sinks needless?"
scale = "scale/micro"
common = {"bos": True, "dtype": "bfloat16", "learning_rate": 0.002, "min_lr": 0.0002}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("gate", "Sink_1"), ("gate", "top1/median"), ("clip", "Sink_1")]
arms = {"pre": "prenorm", "gate": "gate_head", "clip": {"stream_clip": 2.0}}
ablations = ["spike_zero", "spike_mean", "spike_scale", "spike_direction", "sink_mask"]
