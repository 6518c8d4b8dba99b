"""How far the curves of two runs lie apart, value by value.

    python tests/bench/curves.py runs/insertion_state/one runs/insertion_state/two

For each tag: steps in both, largest relative difference, and the first step above 1e-5.
"""

import sys
from pathlib import Path

import numpy as np

from act_lightning.study.events import RunEvents


def main(one, other):
    runs = []
    for folder in (one, other):
        runs.append(RunEvents(Path(folder)))
        runs[-1].reload()
    for tag, series in sorted(runs[0].scalars.items()):
        theirs = runs[1].scalars.get(tag)
        if theirs is None or not np.array_equal(series.steps, theirs.steps):
            print(f"{tag}: logged at other steps")
            continue
        apart = np.abs(series.values - theirs.values) / np.maximum(np.abs(series.values), 1e-12)
        above = series.steps[apart > 1e-5]
        first = f", above 1e-5 from step {above[0]}" if len(above) else ""
        print(f"{tag}: {len(apart)} values, at most {apart.max():.1e}{first}")


if __name__ == "__main__":
    main(*sys.argv[1:])
