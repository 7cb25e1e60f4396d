"""fuzz.py: every kind of damage once, and, marked slow, all of its 10,002 cases."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

ROOT = Path(__file__).resolve().parents[1]
FORMATS = 6


def fuzz(*argv: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *argv], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_every_kind_of_damage_once():
    said = fuzz("--each", "64", EPSDPO_CHECKPOINT="")
    kinds = [int(n) for n in re.findall(r" all (\d+) kinds", said)]
    assert len(kinds) == FORMATS and min(kinds) >= 20 and max(kinds) <= 64
    assert f"{64 * FORMATS} cases, seed 0: 0 wrong" in said


@pytest.mark.slow
def test_ten_thousand():
    said = fuzz()
    assert "10,002 cases, seed 0: 0 wrong" in said
