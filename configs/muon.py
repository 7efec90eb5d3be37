"""Muon on the blocks' matrices (Jordan et al. 2024)."""

optimizer = "muon"
