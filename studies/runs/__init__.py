"""What makes a row of numbers: a run trained, measured, written. The hash of the code is of this too."""
