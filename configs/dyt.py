"""DyT, w tanh(a x), for LayerNorm (Zhu et al. 2025; alphas of Sun et al. 2026)."""

norm = "dyt"
