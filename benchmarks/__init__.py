"""Benchmarks of time, memory and power, compared with named baselines."""
