"""The kills of kills.py, in the whole attack alone: the ordinary tests kill in test_end_to_end.py, test_train.py and others."""

import pytest
from attack_scale import FULL, SEED

if FULL:  # it gives this process one device, where the ordinary tests have eight
    from kills import attack

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FULL, reason="./launch/test.sh attack")]


def test_kills(tmp_path):
    counts = attack(100, SEED, tmp_path)
    assert counts["SIGKILL"] >= 100 and counts["rounds"] > 30
