"""Mix-LN: the first quarter of the layers post-norm, the others pre-norm (Li et al. 2024)."""

norm_place = "post*25% pre"
