"""DeepNorm: post-norm with its residual multiplier and its init (Wang et al. 2022)."""

norm_place = "post"
residual_scale = "deepnorm"
init_scale = "deepnorm"
