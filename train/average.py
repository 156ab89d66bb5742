"""A running average of a model's weights, which may be evaluated and kept in place of the newest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reinforce import signals


class Average:
    """average <- average + share x (newest - average) after every step; `share(step)` is from 0 to 1.

    A constant share 1 - d is the exponential moving average of decay d. With w / (sum of all w so far) it is the
    weighted mean of the steps, w being the step's weight. Tensors of whole numbers (a BatchNorm's count) are copied.
    """

    def __init__(self, model: nn.Module, share: Callable[[int], float]) -> None:
        self.tensors = _copy(model)
        self._model, self._share = model, share

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Step number `step` has changed the model."""
        share = self._share(step)
        if not share:
            return
        for name, tensor in self._model.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, share)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with its averaged weights, for a while."""
        own = _copy(self._model)
        try:
            self._model.load_state_dict(self.tensors)
            yield
        finally:
            with signals.whole():
                self._model.load_state_dict(own)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
