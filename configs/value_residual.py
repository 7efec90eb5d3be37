"""Values are the mean of the layer's own and those of the first layer (ResFormer, Zhou et al. 2024)."""

value = "residual"
