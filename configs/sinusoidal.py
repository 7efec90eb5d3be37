"""Fixed sinusoids (Vaswani et al. 2017)."""

position = "sinusoidal"
