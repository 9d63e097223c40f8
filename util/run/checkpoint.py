"""Checkpoints: written atomically, so that a crash leaves the old file, and loaded without running code."""
import argparse
import io
import os
import re
import warnings
from pathlib import Path

import torch
from timm.models import clean_state_dict

from util.errors import UserError

LATEST = "checkpoint-latest.pth"
ENTRIES = {"epoch": int, "optimizer": dict, "scaler": dict, "history": list, "subset": torch.Tensor}  # or None


def write_atomically(path, content):
    """Write `content` (bytes) to a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    Raises:
        OSError: the file could not be written; what was at `path` before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
        UserError: the file is absent, unreadable, no checkpoint, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
        beside = f"; that folder holds {', '.join(others[:5])}" if others else ""
        raise UserError(f"{flag}: found no file {path}, expected a checkpoint{beside}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{flag}: {path} could not be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises half a dozen types for damaged or foreign files
        reason = "it is empty" if path.stat().st_size == 0 else _why_unreadable(error)
        raise UserError(f"{flag}: {path} is no checkpoint that can be loaded safely: {reason}") from error
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in model.items()):
        raise UserError(f"{flag}: {path} holds no entry 'model' with weights, expected one of this project's "
                        "or the authors' checkpoints")
    for name, kind in ENTRIES.items():
        if not isinstance(checkpoint.get(name), kind | None):
            raise UserError(f"{flag}: {path} holds an entry '{name}' of type {type(checkpoint[name]).__name__}, "
                            f"expected {kind.__name__}")
    if not all(isinstance(record, dict) and isinstance(record.get("epoch"), int)
               for record in checkpoint.get("history") or ()):
        raise UserError(f"{flag}: {path} holds a 'history' that is not one of epochs, expected the lines of log.txt")
    args = checkpoint.get("args")
    args = args if isinstance(args, dict) else vars(args) if isinstance(args, argparse.Namespace) else {}
    model = {re.sub(r"^(enc\.layer\d+\.\d+\.)shortcut\.", r"\1downsample.", name): value
             for name, value in clean_state_dict(model).items()}
    return {**checkpoint, "model": model, "args": args}


def _why_unreadable(error):
    if "GLOBAL" in str(error):  # the pickle names a class or function
        return "it holds Python objects beyond tensors and plain values, none of which was executed"
    return "it is truncated or was not written by PyTorch"


def stage_of(checkpoint):
    """Which stage wrote a loaded checkpoint: "pretrain_bns", "lineprob_bns", "finetune_ipdpp", or None if unclear.

    Published checkpoints do not say. A projector marks stage 1, and probing optimises the linear layer alone.
    """
    if "stage" in checkpoint["args"]:
        return checkpoint["args"]["stage"]
    if any(name.startswith("projector.") for name in checkpoint["model"]):
        return "pretrain_bns"
    if "lin.weight" not in checkpoint["model"]:
        return None
    groups = (checkpoint.get("optimizer") or {}).get("param_groups", [])
    return "lineprob_bns" if sum(len(group["params"]) for group in groups) == 2 else "finetune_ipdpp"


def load_weights(module, weights, source):
    """Copy `weights` (a state dict) into `module`; `source` names the flag and file in the error.

    Raises:
        UserError: a name or shape differs, as it does for another architecture or another number of classes.
    """
    own = module.state_dict()
    wrong = [f"{name} of shape {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
             for name in own if name in weights and own[name].shape != weights[name].shape]
    wrong += [f"no {name}" for name in own if name not in weights]
    wrong += [f"{name}, which this model lacks" for name in weights if name not in own]
    if wrong:
        raise UserError(f"{source} does not fit this --model and --num_classes: found {wrong[0]}"
                        + (f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""))
    module.load_state_dict(weights)


def load_encoder(encoder, checkpoint, source):
    """Copy the weights of a checkpoint's encoder, of any stage, into `encoder`. Raises UserError as `load_weights`."""
    weights = {name[4:]: value for name, value in checkpoint["model"].items() if name.startswith("enc.")}
    if not weights:
        raise UserError(f"{source} holds no encoder, expected weights whose names begin with 'enc.'")
    load_weights(encoder, weights, source)


def restore_optimizer(optimizer, checkpoint):
    """Load the moments of AdamW or SGD. Learning rate and weight decay stay what the flags say.

    Returns why nothing was loaded, as the end of a sentence about the checkpoint, or None if the moments were.
    """
    groups = optimizer.state_dict()["param_groups"]
    shapes = {index: parameter.shape for index, parameter in enumerate(
        parameter for group in optimizer.param_groups for parameter in group["params"])}
    state = (checkpoint.get("optimizer") or {}).get("state", {})
    if not state:
        return "holds no optimiser state"
    name = "momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"
    found = {index: moments[name].shape for index, moments in state.items() if name in moments}
    if not found:
        return "holds the state of another optimiser"
    if not found.items() <= shapes.items():  # a parameter that no gradient has reached has no moments
        return "holds optimiser state that does not fit this model"
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return None


def numbered_checkpoints(folder):
    """Paths `checkpoint-<epoch>.pth` in `folder`, in the order in which they were written."""
    return sorted(Path(folder).glob("checkpoint-[0-9]*.pth"), key=lambda path: path.stat().st_mtime_ns)


def newest_checkpoint(paths):
    """The newest of `paths` that loads, or None. Damaged files are named and passed over."""
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            load_checkpoint(path)
            return path
        except UserError as error:
            print(f"passed over: {error}", flush=True)
    return None
