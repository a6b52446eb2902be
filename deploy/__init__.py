"""What export.py writes: a finished student as files that other programs run."""
