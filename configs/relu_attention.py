"""ReLU attention, without normalisation (Wortsman et al. 2023)."""

attention = "relu"
