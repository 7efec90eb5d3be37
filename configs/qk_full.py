"""Queries and keys normalised over heads x width, RMSNorm throughout."""

norm = "rmsnorm"
qk_norm = "full"
