"""A learned multiplier on every update, from 0 (Bachlechner et al. 2020)."""

residual_scale = "rezero"
