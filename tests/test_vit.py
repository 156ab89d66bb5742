"""What held models compute in fewer passes, against open_clip's own towers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reinforce.models import vit
from reinforce.models.flops import tflop
from reinforce.models.open_clip import open_clip

VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
TEXTS = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
POOLER = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
COCA_TEXT = {"embed_cls": True, "output_tokens": True}
DECODER = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1, "mlp_ratio": 4}


def made(kind: type = open_clip.model.CLIP, vision: dict[str, Any] = {}, text: dict[str, Any] = {}, **more: Any) -> Any:
    """In float64, biases and norms not as they begin."""
    torch.manual_seed(0)
    model = kind(24, vision_cfg=VISION | vision, text_cfg=TEXTS | text, **more).double().eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or ".ln_" in name:
            weight.data += 0.3 * torch.randn_like(weight)
    return model.requires_grad_(False)


def answers(model: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(1, 60, (5, 11 if isinstance(model, open_clip.CoCa) else 12))
    tokens[:, 7] = 63
    with torch.inference_mode():
        return model.encode_image(torch.randn(5, 3, 32, 32, dtype=torch.float64)), model.encode_text(tokens)


def quickened(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, vit.Blocks)]


BOTH, IMAGE, TEXT = ["visual.transformer", "transformer"], ["visual.transformer"], ["transformer"]


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (lambda: made(), BOTH),
        (lambda: made(quick_gelu=True), BOTH),
        (lambda: made(vision={"pool_type": "avg", "final_ln_after_pool": True}, text={"pool_type": "last"}), BOTH),
        (lambda: made(vision={"no_ln_pre": True}, text={"no_causal_mask": True}), BOTH),
        (lambda: made(open_clip.model.CustomTextCLIP), ["visual.transformer", "text.transformer"]),
        (lambda: made(open_clip.model.CustomTextCLIP, text={"embed_cls": True}), IMAGE),
        (lambda: made(open_clip.CoCa, vision=POOLER, text=COCA_TEXT, multimodal_cfg=DECODER), IMAGE),
        (lambda: made(vision=POOLER | {"output_tokens": False}), BOTH),
        (lambda: made(vision={"ls_init_value": 0.5}), TEXT),
        (lambda: made(vision={"qk_norm": True}, text={"qk_norm": True}), []),
    ],
    ids=[
        "clip",
        "quick gelu",
        "pools",
        "no norm, no mask",
        "custom",
        "class token of texts",
        "coca",
        "pooler",
        "layer scale",
        "other blocks",
    ],
)
def test_they_are_open_clips(model: Any, changed: list[str]) -> None:
    model = model()
    expected = answers(model)
    work = tflop(model.encode_image, torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    vit.quicken(model)
    assert quickened(model) == changed
    for got, of_tower in zip(answers(model), expected, strict=True):
        assert got.shape == of_tower.shape and float(of_tower.std()) > 0.01
        assert torch.allclose(got, of_tower, rtol=0, atol=1e-6)  # the offsets are float32
    assert tflop(model.encode_image, torch.zeros(1, 3, 32, 32, dtype=torch.float64)) == work  # what the model asks for


def test_the_class_token_alone_goes_through_the_end_of_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    vit.quicken(model)
    seen: list[int] = []
    plain = vit.activated
    monkeypatch.setattr(vit, "activated", lambda x, *rest: seen.append(len(x)) or plain(x, *rest))
    with torch.inference_mode():
        model.encode_image(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    assert seen == [5 * 17, 5 * 17, 5]


def test_what_is_no_model_of_open_clip_stays() -> None:
    model = nn.ModuleDict({"visual": nn.Linear(2, 2), "text": nn.Linear(2, 2)})
    vit.quicken(model)
    assert not quickened(model)


def test_the_products_that_libraries_have_are_there() -> None:
    """torch's product with GELU, which has no public name: on a GPU it is the tanh form."""
    x, layer = torch.randn(6, 8), nn.Linear(8, 4)
    got = torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
    assert torch.allclose(got, vit.activated(x, layer, nn.GELU()), atol=1e-3)
