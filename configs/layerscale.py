"""A learned multiplier per channel on every update (Touvron et al. 2021)."""

residual_scale = "learned"
