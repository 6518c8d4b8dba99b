"""Whether tests can draw here."""

import pytest

from act_lightning.sim.opengl import OpenGLNotFoundError, find_backend


def has_opengl() -> bool:
    try:
        find_backend()
    except OpenGLNotFoundError:
        return False
    return True


needs_opengl = pytest.mark.skipif(not has_opengl(), reason="needs OpenGL")
