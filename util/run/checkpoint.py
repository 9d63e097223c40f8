"""Checkpoints: written atomically, so that a crash leaves the old file, and loaded without running code."""
import argparse
import io
import os
import re
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from timm.models import clean_state_dict

from util.errors import UserError

# What a checkpoint may hold beside tensors and plain values: the authors' flags, and NumPy's numbers.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
PLAIN = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
         *((NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]  # NumPy 1 and 2


def write_atomically(path, content):
    """Write `content` (bytes) to a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    Raises:
        OSError: the file, which it names, could not be written; what was at `path` before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write: {error.strerror}", str(path)) from error


def save_checkpoint(state, path):
    """Write the dict `state` (tensors and plain values only) to `path`. Raises OSError as `write_atomically`."""
    buffer = io.BytesIO()  # written straight to the file, torch.save would hide why that fails
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path, flag="--resume"):
    """Read a checkpoint of this project or of the paper's authors to the CPU. Weights get this project's names.

    Returns:
        dict with at least `model` (names of `models`, timm's inside `enc.`) and `args` (dict, may be empty).

    Raises:
        UserError: the file is absent, damaged, no checkpoint, or holds anything but tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}, expected a checkpoint") from error
    except Exception as error:  # torch.load raises half a dozen types for damaged or foreign files
        raise UserError(f"{flag} {path}: cannot be loaded safely: it is damaged, not written by PyTorch, or holds "
                        "Python objects beyond tensors and plain values, none of which was executed") from error
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{flag} {path}: holds no entry 'model', expected a checkpoint of this project or the authors")
    args = checkpoint.get("args")
    if isinstance(args, argparse.Namespace):  # the authors', who name their networks in another way
        args = {name: value for name, value in vars(args).items() if name != "model"}
    model = {re.sub(r"^(enc\.layer\d+\.\d+\.)shortcut\.", r"\1downsample.", name): value
             for name, value in clean_state_dict(model).items()}
    return {**checkpoint, "model": model, "args": args if isinstance(args, dict) else {}}


def stage_of(checkpoint):
    """Which stage wrote a loaded checkpoint, such as "pretrain_bns"; None if unclear.

    Published checkpoints do not say, but a projector marks stage 1.
    """
    if any(name.startswith("projector.") for name in checkpoint["model"]):
        return "pretrain_bns"
    return checkpoint["args"].get("stage")


def load_weights(module, weights, source):
    """Copy `weights` (a state dict) into `module`; `source` names the flag and file in the error.

    Raises:
        UserError: a name or shape differs, as it does for another architecture or another number of classes.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:  # a headline, then a line for each kind of difference
        difference = textwrap.shorten(str(error).splitlines()[1], 200)
        raise UserError(f"{source} does not fit this stage, --model and --num_classes: {difference}") from error


def load_encoder(encoder, checkpoint, source):
    """Copy the weights of a checkpoint's encoder, of any stage, into `encoder`. Raises UserError as `load_weights`."""
    weights = {name[4:]: value for name, value in checkpoint["model"].items() if name.startswith("enc.")}
    load_weights(encoder, weights, source)
