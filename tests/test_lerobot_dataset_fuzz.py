"""The reader of LeRobotDatasets on mutated files: no crash, no hang, no silent wrong data.

What each kind of file can tell of damage stands in `lerobot_fuzz.py`. LEROBOT_FUZZ=6000 sets the
number of mutated data sets; the default is a few hundred, always the same ones.
"""

import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import lerobot_fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("LEROBOT_FUZZ", "300"))
SLOW_INPUTS = 2500
TIME_LIMIT_S = 20

MUTATIONS = st.builds(
    lerobot_fuzz.Mutation,
    base=st.sampled_from(lerobot_fuzz.BASES),
    file=st.integers(0, 1000),
    structural=st.booleans(),
    kind=st.integers(0, 1000),
    where=st.integers(0, 2**20),
    what=st.integers(0, 2**10),
)


class Judge:
    """Asks a process of its own, which may crash."""

    def __init__(self):
        self._pool = None
        self.verdicts = Counter()

    def __call__(self, mutation):
        if self._pool is None:
            self._folder = tempfile.mkdtemp()
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, lerobot_fuzz.start, (self._folder,))
            self._pool.submit(int).result()  # starting takes seconds
        try:
            verdict, what = self._pool.submit(lerobot_fuzz.judge, mutation).result(TIME_LIMIT_S)
        except (BrokenProcessPool, TimeoutError) as error:
            self.close()
            verdict, what = "wrong", f"the reader crashed or hung: {error!r}"
        self.verdicts[verdict] += 1
        if verdict != "wrong":
            self.verdicts[f"{verdict} {kind_of(what)}"] += 1
        assert verdict != "wrong", f"{mutation}: {what}"

    def close(self):
        if self._pool is not None:
            for process in list(self._pool._processes.values()):
                process.kill()
            self._pool.shutdown()
            self._pool = None
            shutil.rmtree(self._folder)


def kind_of(name):
    folder, _, rest = name.partition("/")
    return rest.partition("/")[0] if folder == "meta" else folder


@pytest.fixture(scope="module")
def judge():
    judge = Judge()
    yield judge
    judge.close()


def run(judge, inputs):
    judge.verdicts.clear()
    options = settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    options(given(MUTATIONS)(lambda mutation: judge(mutation)))()
    for verdict, count in sorted(judge.verdicts.items()):
        print(f"{verdict:24} {count:6}")
    assert min(judge.verdicts[verdict] for verdict in ("same", "refused", "other")) > 0


def test_mutated_data_sets(judge):
    run(judge, INPUTS)


@pytest.mark.slow
def test_many_mutated_data_sets(judge):
    run(judge, SLOW_INPUTS)
