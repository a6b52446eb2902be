"""Tables and pictures of finished runs: ``python -m report`` and ``python -m report.curves``."""
