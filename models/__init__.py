"""The networks: a ResNet with a stem for small images, followed by a projector (stage 1) or a linear layer."""
import timm
import torch
from timm.models import is_model_in_modules
from torch import nn

import models.cifar_resnet  # noqa: F401  registers the CIFAR ResNets with timm
from util.errors import UserError


def create_encoder(name):
    """Build one of timm's ResNets or of the CIFAR ResNets without its classification layer, randomly initialised.

    timm's get the stem of the CIFAR literature, a 3x3 convolution of stride 1 and no pooling (paper, section 5). All
    are initialised He-normal (fan out), the last norm of each block at 1, not 0.

    Returns:
        Module from float (N, 3, H, W) to (N, num_features), with the attribute `num_features`.

    Raises:
        UserError: no such ResNet.
    """
    if not is_model_in_modules(name, ["resnet", "cifar_resnet"]):
        raise UserError(f"--model: found '{name}', expected a ResNet of timm, such as resnet18, or cifar_resnet20, 32 "
                        "or 56")
    encoder = timm.create_model(name, num_classes=0, zero_init_last=False)
    if is_model_in_modules(name, ["resnet"]):
        encoder.conv1 = nn.Conv2d(3, encoder.layer1[0].conv1.in_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder


class BNSNetwork(nn.Module):
    """Encoder and projector of stage 1: Linear(num_features, hidden_dim), ReLU, Linear(hidden_dim, embed_dim)."""

    def __init__(self, encoder, embed_dim=128, hidden_dim=2048):
        super().__init__()
        self.enc = encoder
        self.projector = nn.Sequential(
            nn.Linear(encoder.num_features, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embed_dim))

    def forward(self, *views):
        """Each view (N, 3, H, W) passes the encoder alone, hence with its own batch statistics -> (N, embed_dim)."""
        return tuple(self.projector(self.enc(view)) for view in views)


class Float32Linear(nn.Linear):
    """Linear layer that computes in float32 under autocast too.

    bfloat16 logits would leave IP-DPP no digits to tell confident predictions apart.
    """

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


class Classifier(nn.Module):
    """Encoder and linear layer of the later stages, (N, 3, H, W) -> logits (N, num_classes) in float32.

    A frozen encoder gets no gradients and stays in eval mode, so that its batch-norm statistics do not drift.
    """

    def __init__(self, encoder, num_classes, frozen=False):
        super().__init__()
        self.enc = encoder.requires_grad_(not frozen)
        self.lin = Float32Linear(encoder.num_features, num_classes)
        self.frozen = frozen

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.enc.eval()
        return self

    def forward(self, images):
        return self.lin(self.enc(images))
