"""QK norm and norms on the sub-layers' output, the QK + output arm of Sun et al. 2026 (OLMo 2)."""

norm = "rmsnorm"
norm_place = "output"
qk_norm = "full"
