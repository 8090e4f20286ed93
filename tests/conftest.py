"""Puts shared fixtures (plain modules beside this file) on the path of every test folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
