"""The scripts on a CUDA device that computes nothing: its tensors are PyTorch's fake ones, those on the CPU are real.

This shows, without a GPU, a tensor on the wrong device and a step that waits for the device; no values, no speed.
Most names used here are private to PyTorch: the tests run only with the version that requirements.txt pins.
"""
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import FINETUNE, LINEPROB, PRETRAIN, final_file, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import engine
from util.batches import DeviceLoader

REQUIREMENTS = (Path(__file__).resolve().parents[1] / "requirements.txt").read_text()
if f"torch=={torch.__version__.partition('+')[0]}" not in REQUIREMENTS or torch.cuda.is_available():
    pytest.skip("needs the pinned PyTorch, and no GPU", allow_module_level=True)
from torch._subclasses import fake_tensor  # noqa: E402

pytestmark = pytest.mark.slow
ATEN = torch.ops.aten
NEEDS_VALUES = {ATEN.nonzero.default, ATEN.masked_select.default, ATEN._unique2.default, ATEN.bincount.default,
                ATEN.repeat_interleave.Tensor, ATEN.equal.default, ATEN._local_scalar_dense.default}
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}


def is_fake(value):
    return isinstance(value, fake_tensor.FakeTensor)


class FakeCuda(TorchDispatchMode):
    """Runs what concerns CUDA on fake tensors and the rest as it is.

    Attribute `waits`: how often a real device would have been waited for, by reason.
    """

    def __init__(self):
        super().__init__()
        self.fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_cpu = [tensor for tensor in tensors if not is_fake(tensor)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if len(on_cpu) == len(tensors) and target != "cuda":
            return func(*args, **kwargs)
        if func.namespace == "aten" and func._can_decompose():  # under inference mode, composite operations come whole
            with self:
                return func.decompose(*args, **kwargs)
        reason = self._waits_for(func, args, kwargs, on_cpu, target)
        if reason:
            self.waits[reason] += 1
        if func is ATEN._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        if target == "cpu":
            return getattr(args[0], "source", torch.zeros(args[0].shape)).to(kwargs.get("dtype") or args[0].dtype)
        with self.fake:
            result = func(*args, **kwargs)
        if func is ATEN._to_copy.default and on_cpu:
            result.source = on_cpu[0]
        return result

    def _waits_for(self, func, args, kwargs, on_cpu, target):
        """Why a real device would be waited for, or None. An operation with tensors of both devices fails."""
        if func in NEEDS_VALUES:
            return func.name()
        if target == "cpu" or (func is ATEN.copy_.default and not is_fake(args[0])):
            return "copy to the CPU"
        if on_cpu and func in COPIES:
            unblocking = kwargs.get("non_blocking") or args[2:3] == (True,)
            return None if unblocking and getattr(on_cpu[0], "pinned", False) else "blocking or unpinned copy"
        if func.name().startswith("aten::index"):
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            fills = func is ATEN.index_put_.default and args[2].ndim == 0  # PyTorch makes it masked_fill_
            if not fills and any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return "boolean index"
            if any(not is_fake(index) for index in indices):
                return "index on the CPU"
        assert all(tensor.ndim == 0 for tensor in on_cpu), f"{func} of tensors on the CPU and on CUDA"
        return None


def backward(loss):
    """Autograd, walked in Python: PyTorch's own engine asks the driver for streams."""
    pending, nodes = Counter(), [loss.grad_fn]
    for node in nodes:  # grows as it goes
        for parent, _ in node.next_functions:
            if parent is not None:
                pending[parent] += 1
                if pending[parent] == 1:
                    nodes.append(parent)
    gradients, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            inputs = [gradients[node].get(i) for i in range(len(node._input_metadata))] if node in gradients else None
            results = node(*inputs) if inputs is not None else None
            if not isinstance(results, tuple):
                results = (results,) * max(1, len(node.next_functions))
            for (parent, i), gradient in zip(node.next_functions, results, strict=False):
                if parent is None:
                    continue
                if gradient is not None:
                    wanted, sums = parent._input_metadata[i], gradients.setdefault(parent, {})
                    gradient = gradient.sum_to_size(tuple(wanted.shape)) if wanted.shape else gradient.sum()
                    gradient = gradient.to(wanted.dtype)
                    sums[i] = sums[i] + gradient if i in sums else gradient
                pending[parent] -= 1
                if not pending[parent]:
                    ready.append(parent)


@pytest.fixture
def fake_cuda(monkeypatch, few_images):
    """A FakeCuda. `of_steps` holds the `waits` of each epoch from its first batch to its last."""
    device, quiet, save, epoch = FakeCuda(), mock.Mock(return_value=None), torch.save, DeviceLoader.epoch

    def pin(tensor):
        pinned = tensor.clone()
        pinned.pinned = True
        return pinned

    def save_zeros(state, file):
        save(tree_map(lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype) if is_fake(leaf) else leaf, state), file)

    def counted(*args):
        device.waits.clear()
        yield from epoch(*args)
        device.of_steps.append(Counter(device.waits))

    device.of_steps = []
    replaced = {
        torch.cuda: {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
                     "is_bf16_supported": lambda **_: True, "_lazy_init": quiet,
                     "manual_seed_all": quiet, "set_device": quiet, "is_current_stream_capturing": lambda: False},
        fake_tensor: {"init_gpu_context": quiet},
        fake_tensor.FakeTensorMode: {"avoid_device_init": True},
        torch.Tensor: {"pin_memory": pin, "backward": backward},
        torch: {"save": save_zeros},
        DeviceLoader: {"epoch": counted},
        engine: {"SHOW_EVERY": float("inf")},  # a line about the loss waits for it
    }
    for owner, attributes in replaced.items():
        for name, value in attributes.items():
            monkeypatch.setattr(owner, name, value)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    yield device
    torch._C._set_only_lift_cpu_tensors(False)


@pytest.mark.parametrize("script, amp, flags", [
    (PRETRAIN, "bfloat16", ["--eval_freq", 1]), (PRETRAIN, "float16", ["--bns_form", "eq12"]),
    (LINEPROB, "none", ["--augment", "crop"]), (FINETUNE, "bfloat16", ["--augment", "auto"]),
    (FINETUNE, "float16", ["--sampling_freq", 1]), (FINETUNE, "none", ["--ipdpp_sampler", "none"]),
    (FINETUNE, "bfloat16", ["--loss", "logit_adjusted", "--ipdpp_sampler", "uniform"])])
def test_no_tensor_is_on_the_wrong_device_and_no_step_waits(script, flags, amp, fake_cuda, tmp_path):
    """In a run of two epochs, one more when it goes on, and --eval."""
    flags = ["--batch_size", 32, "--device", "cuda", "--amp", amp, *flags]
    if script != PRETRAIN:
        flags += ["--num_samples", 5]
    with fake_cuda:
        for epochs in (2, 3):
            run(script, tmp_path, *flags, "--epochs", epochs, "--resume", "auto")
        run(script, tmp_path, *flags, "--eval", final_file(script, tmp_path))
    assert len(fake_cuda.of_steps) == 3 and fake_cuda.waits, "evaluation waits"
    if "auto" not in flags:  # torchvision's warps and sharpness wait for a small matrix
        assert not any(fake_cuda.of_steps), fake_cuda.of_steps
