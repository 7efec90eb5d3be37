"""The training loss counts only positions from 64 on (loss range of Sun et al. 2026)."""

loss_first = 64
