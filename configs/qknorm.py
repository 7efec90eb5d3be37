"""Queries and keys normalised head by head, RMSNorm throughout (Qwen 3)."""

norm = "rmsnorm"
qk_norm = "head"
