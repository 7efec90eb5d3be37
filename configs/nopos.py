"""No positions: causality alone tells them (Kazemnejad et al. 2023)."""

position = "none"
