"""Queries and keys normalised in each head; all norms are RMSNorm (Qwen 3)."""

norm = "rmsnorm"
qk_norm = "head"
