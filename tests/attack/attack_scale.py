"""The scale of the attack and its seed: a small share in the ordinary tests, all of it by `./launch/test.sh attack`."""

import os
import random

FULL = bool(os.environ.get("MEND_ATTACK"))
# A failing test prints it; `MEND_ATTACK_SEED=N` repeats the run.
SEED = int(os.environ.get("MEND_ATTACK_SEED") or random.SystemRandom().randrange(10**6))


def times(few: int, many: int) -> int:
    """How often something is tried: in the ordinary tests, and in the whole attack."""
    return many if FULL else few
