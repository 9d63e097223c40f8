"""Time and memory, as the scripts beside this file measure them."""
import ctypes
import re
import time
from pathlib import Path
from statistics import median

import torch


def median_seconds(function, runs, device="cpu", clock=None):
    """Median seconds of a call, after one call to warm up.

    clock: unset, CPU time of this process on the CPU, so that other work counts less, and wall time on CUDA.
    """
    clock = clock or (time.perf_counter if device == "cuda" else time.process_time)
    seconds = []
    for _ in range(runs + 1):
        begin = clock()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - begin)
    return median(seconds[1:])


class PeakMemory:
    """`bytes()` is the most memory that was in use since this was made, beyond what was in use then. Linux only."""

    def __init__(self, device):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = resident("VmRSS")

    def bytes(self):
        return (torch.cuda.max_memory_allocated() if self.device == "cuda" else resident("VmHWM")) - self.before


def resident(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
