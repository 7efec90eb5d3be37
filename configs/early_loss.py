"""The training loss counts only the first 64 positions."""

loss_last = 64
