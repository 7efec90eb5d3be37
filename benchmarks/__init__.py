"""Time, memory and power, beside named baselines."""
