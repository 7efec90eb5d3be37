"""Fixed sinusoids as positions (Vaswani et al. 2017)."""

position = "sinusoidal"
