"""Every update times 0.5."""

residual_scale = "0.5"
