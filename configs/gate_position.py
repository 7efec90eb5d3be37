"""A gate per channel that depends only on the position."""

gate = "channel"
gate_input = "position"
