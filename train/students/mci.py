"""MobileCLIP's image encoder MCi in a size for two CPU cores; timm has the others, and the blocks.

Source: MobileCLIP (Vasu et al. 2024, arXiv 2311.17049, section 4.2): the FastViT family with MLPs of three times the
width and squeeze-excitation on the last two downsamplers.
"""

from functools import partial
from typing import Any

from timm.models import register_model
from timm.models.fastvit import FastVit, RepConditionalPosEnc


@register_model
def fastvit_mci_tiny(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> FastVit:
    """MCi0 at half its widths and depths, for 64 px."""
    positions: Any = partial(RepConditionalPosEnc, spatial_shape=(7, 7))
    return FastVit(
        layers=(1, 3, 5, 1),
        embed_dims=(32, 64, 128, 256),
        mlp_ratios=(3, 3, 3, 3),
        se_downsamples=(False, False, True, True),
        pos_embs=(None, None, None, positions),
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
        lkc_use_act=True,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
    )
