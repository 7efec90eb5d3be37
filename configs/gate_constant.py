"""A learned constant gate per channel: unconditional."""

gate = "channel"
gate_input = "constant"
