"""Post-norm with normalised queries and keys: not run by the paper."""

norm_place = "post"
norm = "rmsnorm"
qk_norm = "head"
