"""The CIFAR ResNets of He et al. (arXiv 1512.03385, section 4.2), by name in timm's registry.

    encoder = timm.create_model("cifar_resnet32", num_classes=0)  # (N, 3, 32, 32) -> (N, 64)

Almost every figure on CIFAR-LT was published with cifar_resnet32: 0.46 million parameters and 69 million multiply-adds
an image of 32 x 32, an eighth of ResNet-18's with the CIFAR stem.
"""
import torch.nn.functional as F
from timm.models import register_model
from torch import nn

__all__ = []  # timm adds the names that it registers


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: every `stride`-th pixel, missing channels zero."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.missing = stride, channels - in_channels

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, ::self.stride, ::self.stride]
        if self.missing:
            before = self.missing // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.missing - before))
        return F.relu(out + shortcut)


class CIFARResNet(nn.Module):
    """ResNet of 6 n + 2 layers: a 3x3 convolution, three groups of n blocks with 16, 32 and 64 channels, mean pooling.

    Args:
        depth: 6 n + 2, the layers with weights, the classifier counted.
        num_classes: outputs of the classifier; 0 for none, which gives features (N, 64).

    Convolutions are initialised He-normal (fan out), as timm's ResNets are.
    """

    num_features = 64

    def __init__(self, depth, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self._group(16, 16, 1, blocks)
        self.layer2 = self._group(16, 32, 2, blocks)
        self.layer3 = self._group(32, 64, 2, blocks)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _group(in_channels, channels, stride, blocks):
        first = Block(in_channels, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x):
        """Images, float (N, 3, H, W) -> logits (N, num_classes), or features (N, 64)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


@register_model
def cifar_resnet20(num_classes=10, **_):
    """20 layers, 0.27 million parameters. timm passes every model more arguments; none of them means anything here."""
    return CIFARResNet(20, num_classes)


@register_model
def cifar_resnet32(num_classes=10, **_):
    """32 layers, 0.46 million parameters."""
    return CIFARResNet(32, num_classes)


@register_model
def cifar_resnet56(num_classes=10, **_):
    """56 layers, 0.85 million parameters."""
    return CIFARResNet(56, num_classes)
