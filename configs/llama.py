"""Llama's block: RMSNorm, rope, SwiGLU."""

norm = "rmsnorm"
position = "rope"
ffn = "gated"
activation = "silu"
