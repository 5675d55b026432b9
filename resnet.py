"""ResNet-18/34/50/101/152 (He et al. 2016, "Deep Residual Learning for Image Recognition", Table 1).

    network = resnet50()                 # 1000 classes, 25,557,032 parameters
    network.features(x)                  # (N, 2048): the pooled features that the paper evaluates (Sec. 3)
    network.fc = torch.nn.Identity()     # or a projection MLP, as simsiam.py does

The names, order and shapes of all parameters are torchvision's, so a state_dict loads strictly in both
directions. Three details are not in He's table; the released SimSiam code inherits all three from
torchvision:

- in a bottleneck, the stride is on the 3x3 convolution ("ResNet v1.5"), not on the first 1x1;
- the last BN scale of every block starts at 0, so a block starts as the identity (Goyal et al. 2017,
  Sec. 5.1; SimSiam's supplement A asks for it too);
- convolutions start Kaiming-normal, fan_out. DEPARTURE: the paper names "the default PyTorch initializers".
  We follow the code that produced its numbers.
"""
import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., Fig. 5 left).

    (N, in, H, W) -> (N, channels, H/stride, W/stride)
    """
    expansion = 1

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, and a shortcut (Fig. 5 right).

    (N, in, H, W) -> (N, 4 channels, H/stride, W/stride)
    """
    expansion = 4

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        nn.init.zeros_(self.bn3.weight)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, 4 * channels, stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


def shortcut(in_channels, out_channels, stride):
    """The identity where shapes allow it, else a strided 1x1 projection (He et al., Sec. 3.3, option B).

    An empty Sequential is the identity and, like torchvision's None, adds no name to the state_dict.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """He et al.'s Table 1: a stem, four stages, global average pooling, one linear layer.

    block, blocks   the kind of block, and how many of them each stage has
    num_classes     outputs of fc
    width           multiplies every channel count (1/8 of a ResNet-18 is 8, 16, 32, 64 channels)
    cifar_stem      a 3x3 convolution of stride 1 and no max-pool, for 32-pixel images (SimSiam, supplement D)

    Raises ValueError if the width leaves a stage without channels.
    """

    def __init__(self, block, blocks, num_classes=1000, width=1.0, cifar_stem=False):
        super().__init__()
        stem, *stages = (round(channels * width) for channels in (64, 64, 128, 256, 512))
        if stem < 1:
            raise ValueError(f"width {width} leaves the stem without channels: at least 1/64 is needed")
        if cifar_stem:
            self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(stem)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(stem)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def stage(in_channels, channels, count, stride):
            rest = [block(block.expansion * channels, channels, 1) for _ in range(count - 1)]
            return nn.Sequential(block(in_channels, channels, stride), *rest)

        e = block.expansion
        self.layer1 = stage(stem,          stages[0], blocks[0], stride=1)
        self.layer2 = stage(e * stages[0], stages[1], blocks[1], stride=2)
        self.layer3 = stage(e * stages[1], stages[2], blocks[2], stride=2)
        self.layer4 = stage(e * stages[2], stages[3], blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = e * stages[3]
        self.fc = nn.Linear(self.num_features, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x):
        """Normalised images (N, 3, H, W) -> pooled features (N, num_features)."""
        # The shapes are ResNet-50's at 224 pixels.
        x = self.relu(self.bn1(self.conv1(x)))  # (N,   64, 112, 112)
        x = self.maxpool(x)                     # (N,   64,  56,  56)
        x = self.layer1(x)                      # (N,  256,  56,  56)
        x = self.layer2(x)                      # (N,  512,  28,  28)
        x = self.layer3(x)                      # (N, 1024,  14,  14)
        x = self.layer4(x)                      # (N, 2048,   7,   7)
        x = self.avgpool(x)                     # (N, 2048,   1,   1)
        x = torch.flatten(x, 1)                 # (N, 2048)
        return x

    def forward(self, x):
        """Normalised images (N, 3, H, W) -> fc of their features: (N, num_classes), or z in SimSiam."""
        return self.fc(self.features(x))


def resnet18(**options):
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options):
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options):
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options):
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options):
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


ARCHS = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}
