"""Muon for the matrices of the blocks (Jordan et al. 2024)."""

optimizer = "muon"
