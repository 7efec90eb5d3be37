"""Four learned tokens before every sequence (Darcet et al. 2023)."""

n_register = 4
