"""One child process: its CPU seconds, wall time and peak private memory; and what machine this is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """cpu, wall: seconds (cpu: user + system, children included); private: peak bytes of private memory."""

    cpu: float
    wall: float
    private: int


def _private(pid: int) -> int:
    """Anonymous and privately dirtied bytes of a live process; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in text.splitlines()[1:]}
    return max(found.get("Private_Dirty", 0), found.get("Anonymous", 0))


def run(command: Sequence[str], env: Mapping[str, str] | None = None, *, memory: bool = False) -> Cost:
    """Run to the end. `memory` samples its private memory every 20 ms (which costs the child a little).

    Raises RuntimeError with the end of its output where it fails.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=None if env is None else dict(env))
        peak = 0
        while memory:
            time.sleep(0.02)
            done = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if done is not None:
                break
            peak = max(peak, _private(child.pid))
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-3000:].decode(errors='replace')}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, peak)


def machine() -> dict[str, object]:
    """Processor, cores, memory, versions."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
