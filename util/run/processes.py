"""One process or several (torchrun, SLURM): which one this is, its device, and the exchanges that the stages need."""
import ctypes
import os
import platform

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env

from util.errors import UserError


class Processes:
    """The processes of a run: `rank` of this one, their number `world_size`, and this one's `device`.

    Args:
        device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: the requested CUDA device does not exist, or several processes cannot find each other.
    """

    def __init__(self, device="auto"):
        kind, _, index = device.partition(":")
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            raise UserError(f"--device: found '{device}', expected auto, cpu, cuda or cuda:N")
        if kind == "cuda" and torch.cuda.device_count() == 1 and "SLURM_LOCALID" in os.environ:
            os.environ.setdefault("LOCAL_RANK", "0")  # SLURM shows each task its own GPU only
        if kind == "cuda" and int(index or world_info_from_env()[0]) >= torch.cuda.device_count():
            raise UserError(f"--device: found '{device}', but PyTorch sees {torch.cuda.device_count()} CUDA devices")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if is_distributed_env() and missing:
            raise UserError(f"found several processes but no {' and no '.join(missing)} in the environment, expected "
                            "the first node's name and a free port (torchrun sets them, srun does not: see README)")
        started = init_distributed_device_so(f"{kind}:{index}" if index else kind)
        self.device = torch.device(started["device"])
        self.rank, self.world_size = started["global_rank"], started["world_size"]
        # Keep the group alive: if DDP were the last to hold it, PyTorch would free it under a lock and might hang.
        self._group = dist.group.WORLD if self.world_size > 1 else None
        # Small exchanges use the CPUs, so that they need not wait for the GPUs.
        self._hosts = dist.new_group(backend="gloo") if self.world_size > 1 else None

    @property
    def first(self):
        return self.rank == 0

    def sum(self, tensor):
        """Add `tensor` up over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """The mean of `tensor` over all processes."""
        return self.sum(tensor.clone()) / self.world_size

    def any(self, flag):
        """Whether `flag` (bool) holds in any process; every process gets the same answer."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._hosts)
        return bool(flags)

    def from_first(self, function, *args):
        """Call `function(*args)` in the first process only and give its result to all. An exception there ends all."""
        if self.world_size == 1:
            return function(*args)
        value = failure = None
        if self.first:
            try:
                value = function(*args)
            except Exception as error:  # whatever it is, the other processes must not wait for a result
                failure = error
        message = [value, failure is not None]
        dist.broadcast_object_list(message, group=self._hosts)
        value, failed = message
        if failed:
            raise failure or SystemExit(2)  # the first process tells the reason
        return value

    def end(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def keep_freed_memory():
    """Let this process keep the memory that it frees, instead of returning it to the system (with glibc only).

    On the CPU, each training step frees gigabytes of activations, and the next step allocates them again. The system
    would zero every page anew, which took nearly a third of a step of stage 1 at batch 512, measured on two cores.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # glibc's malloc.h: M_TRIM_THRESHOLD, where -1 means never, and M_MMAP_MAX
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)
