"""SOAP with the learning rate and beta1 of its paper (Vyas et al. 2024)."""

optimizer = "soap"
learning_rate = 3e-3
beta1 = 0.95
