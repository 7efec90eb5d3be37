"""No position encoding; positions follow from causality only (Kazemnejad et al. 2023)."""

position = "none"
