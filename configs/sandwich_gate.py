"""Sandwich norm and a gate that depends on the input: both mitigations at once."""

norm_place = "sandwich"
gate = "channel"
