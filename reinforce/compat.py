"""Makes `import torchvision` work on a CPU build of torch. Call before importing torchvision, timm or open_clip.

The torchvision wheel of the package index is linked to CUDA's torch. On a CPU torch its compiled operators silently
do not load, and its import then fails while describing two of them. Declaring these two is enough for its pure-Python
parts, which are all that open_clip and timm use. Elsewhere this does nothing.
"""

import importlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library withdraws its operators when it is collected


def ensure_torchvision() -> None:
    """Import torchvision, declaring its missing operators first where that is needed."""
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    importlib.import_module("torchvision")
