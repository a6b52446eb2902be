"""``python -m report``: see ``report.table``."""

from .table import main

main()
