"""ReLU attention, no normalisation (Wortsman et al. 2023)."""

attention = "relu"
