"""Real faults against the trainer: what happens, what it says, and whether the run then goes on bit by bit."""
