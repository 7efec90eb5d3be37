"""A gate per channel that depends on the position only."""

gate = "channel"
gate_input = "position"
