"""Sandwich norm with the conditional gate: both mitigations at once."""

norm_place = "sandwich"
gate = "channel"
