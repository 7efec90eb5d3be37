"""Arms x seeds: which runs a study asks for, how their rows become one table, and what follows from it."""
