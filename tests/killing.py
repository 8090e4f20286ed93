"""Runs a piece of Python that kills itself at a system call that writes."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

START = """
import os, signal, sys
steps, real = [int(sys.argv[1])], {name: getattr(os, name) for name in ("pwrite", "write", "rename", "fsync")}
def step(name):
    def call(*args):
        steps[0] -= 1
        if steps[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*args)
    return call
for name in real:
    setattr(os, name, step(name))
"""


def killed(work: str, step: int, path: Sequence[str]) -> bool:
    """Run `work` (imports first) in another process, killed at its `step`-th write; whether it got that far."""
    imports, _, rest = work.strip().partition("\n\n")
    command = [sys.executable, "-c", f"{imports}\n{START}\n{rest}", str(step)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode != 0
