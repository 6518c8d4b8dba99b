"""Keeps LeRobot off the network, and prints the parity errors that the tests here measured."""

import os

# Read when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

MEASURED = pytest.StashKey[dict[str, dict[str, float]]]()


@pytest.fixture
def measured(request):
    """Errors by case and quantity, to be filled by tests and shown in the summary."""
    return request.config.stash.setdefault(MEASURED, {})


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(MEASURED, {})
    if not rows:
        return
    columns = list(dict.fromkeys(name for errors in rows.values() for name in errors))
    width = max(map(len, rows))
    terminalreporter.section("largest errors against LeRobot")
    terminalreporter.line(f"{'':{width}} " + " ".join(f"{name:>11}" for name in columns))
    for case, errors in rows.items():
        cells = (f"{errors[name]:.1e}" if name in errors else "-" for name in columns)
        terminalreporter.line(f"{case:{width}} " + " ".join(f"{cell:>11}" for cell in cells))
