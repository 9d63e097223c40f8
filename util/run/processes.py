"""One process or several (torchrun): which one this is, its device and precision, and their exchanges."""
import ctypes
import functools
import os
import platform

import torch
import torch.distributed as dist

from util.errors import UserError


class Processes:
    """The processes that torchrun started: `rank` of this one, their number `world_size`, and this one's `device`.

    Args:
        device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: the requested device does not exist.
    """

    def __init__(self, device="auto"):
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        self.first = self.rank == 0
        kind, _, index = device.partition(":")
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        number = int(index) if index.isdigit() else local_rank
        if kind not in ("cpu", "cuda") or kind == "cuda" and number >= torch.cuda.device_count():
            raise UserError(f"--device: found '{device}', expected auto, cpu, cuda or cuda:N; PyTorch sees "
                            f"{torch.cuda.device_count()} CUDA devices")
        self.device = torch.device(kind, number) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        # Keep the group alive: if DDP were the last to hold it, PyTorch would free it under a lock and might hang.
        self._group = dist.group.WORLD if self.world_size > 1 else None
        # Small exchanges use the CPUs, so that they need not wait for the GPUs.
        self._hosts = dist.new_group(backend="gloo") if self.world_size > 1 else None

    def mean(self, tensor):
        """The mean of `tensor` over all processes."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor / self.world_size

    def wait(self):
        """Wait until all processes have come here."""
        if self.world_size > 1:
            dist.barrier(group=self._hosts)

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


def amp_dtype(name, device):
    """The type that `--amp name` means on `device`: torch.bfloat16, torch.float16, or None for float32 throughout."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "none": None}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


def set_precision(args, device):
    """What --amp and --deterministic mean: a function that gives the autocast context, and the gradient scaler.

    args.amp becomes the name of the type that is used.
    """
    dtype = amp_dtype(args.amp, device)
    args.amp = str(dtype).removeprefix("torch.") if dtype else "none"
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.backends.cudnn.allow_tf32 = dtype is not None  # --amp none means float32 throughout
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


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
