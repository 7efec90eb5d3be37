"""A gate per channel that depends only on the token embedding."""

gate = "channel"
gate_input = "token"
