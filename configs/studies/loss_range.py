"""Which positions the training loss counts: the paper's parts of its 4096, here of 128."""

question = "Do spikes and sinks depend on which positions are trained?"
common = {"bos": True, "block_size": 128}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("last_half", "Sink_1"), ("last_half", "largest |h|")]
arms = {
    "all": "prenorm",
    "first_16th": {"loss_last": 8},
    "last_3_quarters": {"loss_first": 32},
    "last_half": {"loss_first": 64},
}
published = {
    "all": (10.1, 46.0, 3818),
    "first_16th": (12.4, 42.1, 5411),
    "last_3_quarters": (10.1, 13.0, 38470),
    "last_half": (10.6, 1.2, 7193),
}
