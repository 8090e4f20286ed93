"""Puts shared fixtures (plain modules beside this file) on the path of every test folder; one thread a worker."""

import os
import sys
from pathlib import Path

# Thread barriers on tiny tensors cost more than they bring, and two workers share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
