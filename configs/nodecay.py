"""No weight decay."""

weight_decay = 0.0
