"""Makes a row of numbers: trains, measures and writes one run. The hash of the code includes this package."""
