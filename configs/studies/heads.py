"""Heads: their width at a fixed count, and their count at a fixed width. Parameters are not matched."""

question = "Do spikes and sinks depend on the width and the number of heads?"
common = {"bos": True, "n_head": 4, "head_dim": 32}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("4x8", "Sink_1"), ("4x64", "top1/median")]
arms = {
    "4x32": {},
    "4x8": {"head_dim": 8},
    "4x16": {"head_dim": 16},
    "4x64": {"head_dim": 64},
    "1x32": {"n_head": 1},
    "2x32": {"n_head": 2},
    "8x32": {"n_head": 8},
    "16x32": {"n_head": 16},
}
published = {
    "4x8": (11.3, 4.1, 291),
    "4x16": (10.8, 9.8, 315),
    "4x32": (10.5, 27.9, 829),
    "4x64": (10.3, 37.7, 2112),
    "8x32": (10.4, 37.1, 1253),
    "16x32": (10.3, 41.7, 1936),
}
