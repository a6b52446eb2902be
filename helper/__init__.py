"""What ties data, models and losses together: options, runs, loops, checkpoints, logs, pictures."""
