"""An entry of JAX's compile cache that a kill cut short is made again."""

import os
import subprocess
import sys

import pytest
from facts import states

from mend_jax.cli.config_files import ROOT

PROGRAM = """
import jax
from mend_jax.cli import compile_cache

with compile_cache.mended():
    print(jax.jit(lambda x: x + 1)(41))
"""


def compile_once(folder):
    settings = {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.split() == ["42"], process.stderr
    return process.stderr


@pytest.mark.slow
def test_a_truncated_entry_is_said_once_and_written_again(tmp_path):
    assert compile_once(tmp_path) == ""
    [entry] = tmp_path.glob("jit__lambda*-cache")
    whole = entry.read_bytes()
    for size in (0, len(whole) // 2):
        entry.write_bytes(whole[:size])
        states(compile_once(tmp_path).removesuffix("\n"), "compile cache", "damaged", "_lambda")
        assert entry.stat().st_size > len(whole) // 2
        assert compile_once(tmp_path) == ""
