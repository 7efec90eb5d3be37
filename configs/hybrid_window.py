"""Three layers that see 128 tokens, then one that sees all, repeated."""

window = "cycle(128*3 0)"
