"""A computation of one fixed shape as a CUDA graph: one launch in place of a thousand.

Every launch is a call that needs Python's lock, for which a worker's threads of pictures wait, too. The same kernels
run in the same order, so that the bytes are the same.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")  # a tensor, or a tree of them
WARM_UP = 3  # calls in which kernels are chosen and loaded, which a capture cannot hold
log = logging.getLogger(__name__)


def captured(function: Callable[[Tensor], T], example: Tensor) -> Callable[[Tensor], T]:
    """`function` of tensors as `example`, which is on the GPU; what it gives is overwritten by the next call.

    A function that cannot be captured, because it waits for the GPU, is given back as it is, and the log says so.
    """
    inputs = example.clone()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = function(inputs)
    except RuntimeError as error:
        log.warning("runs without a CUDA graph: %s", str(error).partition("\n")[0])
        return function

    def replayed(given: Tensor) -> T:
        inputs.copy_(given)
        graph.replay()
        return outputs

    return replayed
