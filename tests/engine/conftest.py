"""Prompts of tests are short: their branches take several slices of a layer, as those of long ones do."""

import pytest

from mmflow_utils.engine import packed_pass


@pytest.fixture(scope="module", autouse=True)
def small_slices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_pass, "ENOUGH_ROWS", 1)
        yield
