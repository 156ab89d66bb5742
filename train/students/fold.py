"""Structural re-parameterisation: the branches that help training become one convolution for inference.

Source: FastViT (Vasu et al. 2023, arXiv 2303.14189, section 3.2) and MobileOne (arXiv 2206.04040, section 3).
"""

import copy
from typing import TypeVar

from timm.layers.conv_bn_act import ConvNormAct
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Model = TypeVar("Model", bound=nn.Module)


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm, which `fold` makes one convolution."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, norm: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x

    def fuse(self) -> nn.Conv1d | nn.Conv2d:
        return fuse_conv_bn_eval(self.conv, self.norm)


def fold(model: Model) -> Model:
    """A copy of a student, in eval mode, that gives the same outputs to 1e-5 of their norm in fewer operations.

    timm folds the branches of MobileCLIP's towers, and not the BatchNorm of its plain `ConvNormAct`, which is folded
    here; a module of ours gives the one that takes its place in `fuse()`, timm's convention. Modules without branches
    and BatchNorm stay as they are. Gradients no longer mean anything.
    """
    copied = copy.deepcopy(model).eval()
    reparameterize_model(copied, inplace=True)
    for module in copied.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Sequential(*module.bn.children())  # what follows a norm there: drop, act
    return copied
