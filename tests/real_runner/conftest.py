"""The embedded model on its lanes, and a folder of adapters for it; a module opens them once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from real_runner.adapters.serving import Folders
from real_runner.hardware import Hardware
from tests.adapter_world import make_world
from tests.hardware import digits_hardware


@pytest.fixture(scope="module")
def hardware() -> Iterator[Hardware]:
    with digits_hardware() as opened:
        yield opened


@pytest.fixture(scope="module")
def folders(hardware: Hardware, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_world(tmp_path_factory.mktemp("adapters"), hardware.model)
