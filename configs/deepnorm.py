"""DeepNorm (Wang et al. 2022): post-norm, its residual multiplier and its init."""

norm_place = "post"
residual_scale = "deepnorm"
init_scale = "deepnorm"
