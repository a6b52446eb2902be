"""Training: options, loaders, teacher and bank, student, objective, step, run, processes."""
