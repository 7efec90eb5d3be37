"""DyT, w tanh(a x), in place of LayerNorm (Zhu et al. 2025; alphas of Sun et al. 2026)."""

norm = "dyt"
