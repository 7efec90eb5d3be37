"""Llama's block: RMSNorm, RoPE, SwiGLU."""

norm = "rmsnorm"
position = "rope"
ffn = "gated"
activation = "silu"
