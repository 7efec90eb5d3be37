"""Queries and keys normalised over heads x width; all norms are RMSNorm."""

norm = "rmsnorm"
qk_norm = "full"
