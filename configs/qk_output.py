"""The paper's QK + output arm (OLMo 2; Sun et al. 2026)."""

norm = "rmsnorm"
norm_place = "output"
qk_norm = "full"
