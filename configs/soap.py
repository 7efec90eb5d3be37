"""SOAP (Vyas et al. 2024), with its paper's rate and beta1."""

optimizer = "soap"
learning_rate = 3e-3
beta1 = 0.95
