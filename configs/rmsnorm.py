"""RMSNorm for LayerNorm (Zhang & Sennrich 2019)."""

norm = "rmsnorm"
