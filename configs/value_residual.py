"""Values are the mean of a layer's own and the first layer's (ResFormer, Zhou et al. 2024)."""

value = "residual"
