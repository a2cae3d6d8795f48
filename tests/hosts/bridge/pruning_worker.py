"""Run by ranks.py: the example that prunes in a user's script, in a layout, from the weights of the live model.

Arguments: teacher, corpus, output folder, JSON of what stays, JSON of the layout.
"""

import json
import sys
from pathlib import Path

from workers import leave, process_group

EXAMPLES = Path(__file__).parents[3] / "examples"


def main():
    teacher, corpus, out, keep, layout = sys.argv[1:]
    with process_group():
        import nemo_minitron.bridge as bridge

        class Live(bridge.Pruning):
            """The callback without a teacher: it reads the weights of the model that it scores."""

            def __init__(self, out, keep, teacher, **options):
                super().__init__(out, keep, **options)

        sys.path.insert(0, str(EXAMPLES))
        import bridge_prune

        bridge.Pruning, bridge_prune.KEEP = Live, json.loads(keep)
        bridge_prune.LAYOUT |= json.loads(layout)
        bridge_prune.main(teacher, corpus, out)
    leave()


if __name__ == "__main__":
    main()
