"""Mix-LN: post-norm in the first quarter of the layers, pre-norm in the others (Li et al. 2024)."""

norm_place = "post*25% pre"
