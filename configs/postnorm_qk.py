"""Post-norm with normalised queries and keys, an arm that Sun et al. 2026 did not run."""

norm_place = "post"
norm = "rmsnorm"
qk_norm = "head"
