"""What a training run needs beside model.py and train.py: config, machine, checkpoints, logs."""
