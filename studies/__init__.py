"""Plans the runs of a study (arms x seeds), makes a table of their rows, and computes statistics and verdicts."""
