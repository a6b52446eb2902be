"""A campaign of faults: ``python -m tests.campaign --minutes 60``; not part of the tests.

Tiny runs of every script are killed, stopped, given damaged files and full disks, in turn and at random. Each must end
bit-identical to a run that nothing happened to, or be refused in one line; anything else is printed and counted as
lost. Counts are kept in the folder, and the same command adds to them.

``targets``: the commands and files that faults meet, a row each. ``jobs``: one command in processes of its own.
``faults``: what is done to it, and what it must end with. ``soak``: a long run, whose resources must not grow.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest has it
