"""Heads: their width at a fixed count, and their count at a fixed width. Parameters are not matched."""

question = "Do spikes and sinks depend on the width and the number of heads?"
common = {"bos": True, "n_head": 4, "head_dim": 32}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("4x8", "Sink_1"), ("4x64", "top1/median")]
arms = {
    "4x32": {},
    **{f"4x{width}": {"head_dim": width} for width in (8, 16, 64)},
    **{f"{n}x32": {"n_head": n} for n in (1, 2, 8, 16)},
}
published = {
    "4x8": (11.3, 4.1, 291),
    "4x16": (10.8, 9.8, 315),
    "4x32": (10.5, 27.9, 829),
    "4x64": (10.3, 37.7, 2112),
    "8x32": (10.4, 37.1, 1253),
    "16x32": (10.3, 41.7, 1936),
}
