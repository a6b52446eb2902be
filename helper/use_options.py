"""The command lines of what uses a finished student: evaluate.py and export.py."""
