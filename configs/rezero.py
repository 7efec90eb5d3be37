"""A learned multiplier on every update, which starts at 0 (Bachlechner et al. 2020)."""

residual_scale = "rezero"
