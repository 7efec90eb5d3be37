"""The parts of a training run besides model.py and train.py: config, machine, checkpoints, logs, checks."""
