"""A gate per channel that depends on the token embedding only."""

gate = "channel"
gate_input = "token"
