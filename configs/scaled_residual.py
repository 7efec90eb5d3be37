"""Every update times 1/sqrt(2L)."""

residual_scale = "inv_sqrt_2L"
