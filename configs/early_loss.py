"""The training loss counts the first 64 positions only."""

loss_last = 64
