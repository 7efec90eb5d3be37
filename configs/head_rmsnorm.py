"""RMSNorm on each head's output, after its values are summed (2605.06611)."""

head_out = "rmsnorm"
