"""RMSNorm in place of LayerNorm (Zhang & Sennrich 2019)."""

norm = "rmsnorm"
