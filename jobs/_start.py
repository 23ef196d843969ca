"""Find the library in a checkout that is not installed, and start a command.

`ray job submit --working-dir .` unpacks the checkout on the cluster, where only the dependencies
are installed; so `platform/` is put on the path before `altiplano` is imported.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))


def start(*verb: str) -> None:
    """Run one command with this script's own arguments: `CONFIG [section.key=value ...]`."""
    from altiplano.cli import main

    sys.argv[1:1] = verb
    main()
