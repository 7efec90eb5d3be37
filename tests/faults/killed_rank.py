"""For torchrun: train.py in which one rank is killed once. KILL_RANK, KILL_STEP: which, before which step."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from spikesink.errors import cli
from tests.faults.harms import BeforeStep, kill

if os.environ["RANK"] == os.environ["KILL_RANK"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    BeforeStep(int(os.environ["KILL_STEP"]), kill)()
cli(train.main)
