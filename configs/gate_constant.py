"""A gate per channel that is a learned constant."""

gate = "channel"
gate_input = "constant"
