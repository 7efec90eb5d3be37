"""The training loss counts from position 64 on (Sun et al. 2026, loss range)."""

loss_first = 64
