"""Every student of the table keeps one contract; sizes are those of the papers; folding changes only the speed.

What needs the weights of a full-size student is slow: the default is the small ones, `make test-slow` runs all.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from timm.layers.conv_bn_act import ConvNormAct
from torch import Tensor, nn

from reinforce.errors import ConfigError
from reinforce.models.open_clip import open_clip
from train import students
from train.students import hybrid_text, mambavision
from train.students.fold import fold

FIXED = {"vit_b_16", "vit_tiny", "mobileclip_b", "resnet_tiny"}  # their positions are tied to one image size
SMALL = ["mamba_tiny", "mobileclip_s0_tiny"]


def each(names: list[str]) -> list[Any]:
    """Full-size students are slow."""
    return [name if "tiny" in name else pytest.param(name, marks=pytest.mark.slow) for name in names]


def small_mambavision(layer_scale: float | None = 1e-5) -> mambavision.MambaVision:
    torch.manual_seed(0)
    return mambavision.MambaVision(mambavision.Size(32, 8, (1, 1, 2, 2), (2, 4), layer_scale), 8)


@cache
def student(name: str) -> students.Student:
    """Built once for the tests that leave it as it is; the others copy its model."""
    return students.create(name, seed=3)


def batch(of: students.Student, num: int = 2) -> tuple[Tensor, Tensor]:
    """Pictures at the student's size, or at the smallest that it takes, and captions."""
    size = of.image_px if of.name in FIXED else min(of.image_px, 64)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num, 3, size, size, generator=generator), of.tokenizer(["a red heart", "two cats on a mat"][:num])


def randomise_norms(model: nn.Module) -> None:
    """As after training: with statistics of 0 and 1 and gains of 1 a wrong fold can be right."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                nn.init.uniform_(tensor, low, high)
    for name, parameter in model.named_parameters():  # layer scales, which start near 0 and would hide a branch
        if name.endswith(("gamma", "scale")) and parameter.ndim and parameter.abs().max() < 1e-3:
            nn.init.uniform_(parameter, -0.5, 0.5)


@pytest.mark.parametrize("name", each(students.names()))
def test_every_student_keeps_the_contract(name: str) -> None:
    """Unit vectors of one width, a gradient for every weight, a step that changes them, weights that load."""
    given = student(name)
    model = copy.deepcopy(given.model).train()
    images, tokens = batch(given)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = given.model.state_dict()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # a dropped branch has no gradient
    out = model(images, tokens)
    width = json.loads((given.folder / students.CONFIG).read_text())["model_cfg"]["embed_dim"]
    for features in (out["image_features"], out["text_features"]):
        assert features.shape == (2, width)
        assert features.norm(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-5)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    F.cross_entropy(logits, torch.arange(2)).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    optimiser.step()
    still = [key for key, p in model.named_parameters() if p.requires_grad and p.equal(before[key])]
    assert len(still) < 0.1 * len(before), still  # the first token's embedding moves its matrix; keys' biases need not

    fresh = copy.deepcopy(given.model)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert fresh.eval()(images, tokens)["image_features"].equal(model.eval()(images, tokens)["image_features"])


@pytest.mark.parametrize("name", ["vit_tiny", *SMALL])
def test_a_seed_is_a_student(name: str) -> None:
    state = torch.random.get_rng_state()
    first, second, third = (students.create(name, seed).model.state_dict() for seed in (1, 1, 2))
    assert all(first[key].equal(second[key]) for key in first)
    assert not all(first[key].equal(third[key]) for key in first)
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize("name", ["vit_tiny", *SMALL])
def test_another_size_is_kept_where_it_is_saved(name: str, tmp_path: Path) -> None:
    students.create(name).save(tmp_path / "a")
    larger = students.create(str(tmp_path / "a"), force_image_size=96)
    larger.save(tmp_path / "b")
    again = students.create(str(tmp_path / "b"))
    assert again.image_px == 96 and students.create(str(tmp_path / "a")).image_px == 64
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (one.model.eval().encode_image(images) for one in (larger, again))
    assert first.equal(second)
    small, large = (students.create(str(tmp_path / which)).model.state_dict() for which in "ab")
    resized = {key for key in small if small[key].shape != large[key].shape}
    assert all("positional_embedding" in key for key in resized)  # the rest are the weights of the small one
    assert all(small[key].equal(large[key]) for key in small.keys() - resized)


@pytest.mark.parametrize("name", each(["vit_tiny", *SMALL, "mamba_small", "mamba_small_v1", "dmclip_b"]))
def test_checkpointing_changes_memory_only(name: str) -> None:
    gradients, forwards = [], []
    for enable in (False, True):
        model = copy.deepcopy(student(name).model).train()
        model.set_grad_checkpointing(enable)
        calls: list[None] = []
        for module in model.visual.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *args, calls=calls: calls.append(None))
        torch.manual_seed(0)
        out = model(*batch(student(name)))
        (out["image_features"][0] @ out["text_features"][1]).backward()
        forwards.append(len(calls))
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert forwards[1] > 1.5 * forwards[0]
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[key], checkpointed[key], rtol=1e-4, atol=1e-6) for key in plain)


def test_no_strided_1x1_convolution_of_few_channels_sees_channels_last() -> None:
    """There oneDNN writes past the end of a buffer when it computes the gradient of the weights (torch 2.13, AVX2)."""
    model = copy.deepcopy(student("mobileclip_s0_tiny").model)
    seen: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.in_channels == 3:
            module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    pictures, tokens = batch(student("mobileclip_s0_tiny"))
    model(pictures.contiguous(memory_format=torch.channels_last), tokens)  # as the trainer's are
    assert seen == [True]


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


# Image and text tower in training, image tower folded, millions; MobileCLIP's in training are its papers', to the last
# digit they print. Folded they are some thousands smaller, since the norms of plain convolutions are folded, too.
SIZES = {
    "mobileclip_s0": (11.406, 42.44, 11.353),
    "mobileclip_s1": (21.541, 63.43, 21.452),
    "mobileclip_s2": (35.815, 63.43, 35.691),
    "mobileclip_b": (86.349, 63.43, 86.349),
    "mamba_mini": (8.827, 44.51, 8.827),
    "mamba_small": (16.865, 63.43, 16.865),
    "mamba_small_v1": (20.104, 63.43, 20.104),
    "mamba_tiny": (0.900, 0.87, 0.900),
    "mamba_tiny_v1": (0.924, 0.87, 0.924),
    "mobileclip_s0_tiny": (1.586, 0.94, 1.567),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_papers(name: str) -> None:
    image, text, folded = SIZES[name]
    model_cfg = json.loads((students.find(name) / students.CONFIG).read_text())["model_cfg"]
    del model_cfg["custom_text"]
    with torch.device("meta"):
        model = open_clip.CustomTextCLIP(**model_cfg)
        inference = fold(model)
    assert millions(model.visual) == pytest.approx(image, abs=1e-3)
    assert millions(model.text) == pytest.approx(text, abs=0.005)
    assert millions(inference.visual) == pytest.approx(folded, abs=1e-3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (mambavision.Size(80, 32, (1, 3, 8, 4), (8, 16), None), 31.8),
        (mambavision.Size(80, 32, (1, 3, 11, 4), (8, 16), None), 35.1),
        (mambavision.Size(96, 64, (3, 3, 7, 5), (8, 16), None), 50.1),
        (mambavision.Size(128, 64, (3, 3, 10, 5), (8, 16), 1e-5), 97.7),
    ],
    ids=["T", "T2", "S", "B"],
)
def test_sizes_of_mambavision_are_the_papers(size: mambavision.Size, expected: float) -> None:
    with torch.device("meta"):
        assert round(millions(mambavision.MambaVision(size, num_classes=1000)), 1) == expected


@pytest.mark.parametrize("name", each([*SMALL, "mobileclip_s0", "mobileclip_s1", "mobileclip_s2", "dmclip_b"]))
def test_folding_changes_no_output(name: str) -> None:
    """To 1e-5 of a unit vector, while the branches weigh something."""
    model = copy.deepcopy(student(name).model)
    randomise_norms(model)
    images, tokens = batch(student(name))
    folded = fold(model)
    assert model.training
    model.eval()
    with torch.no_grad():
        expected, got = model(images, tokens), folded(images, tokens)
    for tower in ("image_features", "text_features"):
        assert (expected[tower] - got[tower]).norm(dim=-1).max() < 1e-5
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.text.modules())
    assert not any(isinstance(m.bn, nn.BatchNorm2d) for m in folded.modules() if isinstance(m, ConvNormAct))
    assert name == "mamba_tiny" or millions(folded) < millions(model)  # there a sum goes into a kernel


def test_mambavision_folds_checkpoints_and_learns() -> None:
    model = small_mambavision()
    randomise_norms(model)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    folded = nn.Sequential(fold(nn.Sequential(model)))
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), folded(images), atol=1e-5)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 1  # the last, which follows no convolution
    gradients, calls = [], []
    model.layers[0].register_forward_pre_hook(lambda *args: calls.append(model.grad_checkpointing))
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model.train()(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert calls == [False, True, True]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().max() > 0 for g in gradients[0])


def test_a_student_with_the_hybrid_text_tower_is_an_open_clip_folder() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{students.find('mobileclip_s0_tiny')}")
    ends = [model.text.transformer.resblocks[i] for i in (0, -1)]
    assert all(isinstance(block, hybrid_text.RepMixerBlock) for block in ends)
    assert model.context_length == 24 and model.vocab_size == 2000
    assert preprocess.transforms[-1].std == [1.0, 1.0, 1.0]
    model.lock_text_tower()
    assert not any(p.requires_grad for p in model.text.parameters())


def test_a_student_of_oblong_images_is_refused(tmp_path: Path) -> None:
    student("mamba_tiny").save(tmp_path)
    (tmp_path / students.WEIGHTS).unlink()
    described = json.loads((tmp_path / students.CONFIG).read_text())
    described["model_cfg"]["vision_cfg"]["image_size"] = [64, 16]
    described.pop("preprocess_cfg", None)
    (tmp_path / students.CONFIG).write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"64 x 16 pixels; here they are square: .* or force_image_size"):
        students.create(str(tmp_path))
    assert students.create(str(tmp_path), force_image_size=64).image_px == 64


def test_a_folder_without_its_words_is_told_of(tmp_path: Path) -> None:
    student("mamba_tiny").save(tmp_path)
    (tmp_path / "bpe.txt.gz").unlink()
    with pytest.raises(ConfigError, match=f"no bpe.txt.gz in {tmp_path}, .*copy a model's folder as a whole"):
        students.create(str(tmp_path))


def test_the_hybrid_text_tower_reads_both_ways() -> None:
    """A word after the end token reaches it by convolution and by attention: that is what non-causal means."""
    model = copy.deepcopy(student("mobileclip_s0_tiny").model).eval()
    tokens = student("mobileclip_s0_tiny").tokenizer(["a red heart"])
    other = tokens.clone()
    other[0, -1] = 7
    assert not torch.allclose(model.encode_text(tokens), model.encode_text(other))
    with pytest.raises(ValueError, match="no_causal_mask"):
        hybrid_text.build(8, {"mixer_kernel": 3, "width": 8, "heads": 1, "layers": 1})


@pytest.mark.parametrize("size_px", [32, 64, 96, 128])
def test_our_encoder_takes_any_multiple_of_its_stride(size_px: int) -> None:
    visual = student("mamba_tiny").model.visual
    images = torch.rand(1, 3, size_px, size_px + 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert visual(images).isfinite().all()


def test_windows_that_do_not_fill_the_grid_are_an_error() -> None:
    tower = small_mambavision(layer_scale=None).eval()
    assert tower(torch.rand(1, 3, 512, 256)).shape == (1, 8)
    with pytest.raises(ValueError, match="windows of 16"):
        tower(torch.rand(1, 3, 320, 320))


def test_the_middle_of_our_encoder_scans_by_rows_and_by_columns() -> None:
    blocks = [m for m in student("mamba_tiny").model.visual.modules() if type(m).__name__ == "SSDMixer"]
    assert [block.by_columns for block in blocks] == 2 * [False, True, False]
    x = torch.randn(1, 4, 6, 96)
    by_rows, by_columns = blocks[0], copy.deepcopy(blocks[0])
    by_columns.by_columns = True
    for block in (by_rows, by_columns):
        block.local.weight.data = block.local.weight.data + block.local.weight.data.transpose(2, 3)  # rows like columns
    by_columns.local.weight.data = by_rows.local.weight.data
    with torch.no_grad():
        assert torch.allclose(by_rows(x.transpose(1, 2)).transpose(1, 2), by_columns(x), atol=1e-6)
        assert not torch.allclose(by_rows(x), by_columns(x), atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_small_students_train_under_bfloat16(name: str) -> None:
    model = copy.deepcopy(student(name).model).train()
    images, tokens = batch(student(name))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, tokens)
    with torch.no_grad():
        exact = model(images, tokens)
    assert F.cosine_similarity(out["image_features"].float(), exact["image_features"]).min() > 0.99
    (out["image_features"].float() @ out["text_features"].float().T).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("size_px", [64, 128])  # on 128 px the state spaces see 256 tokens, in chunks
@pytest.mark.parametrize("tower", ["mamba", "mambavision"])
def test_weights_of_bfloat16_run_without_autocast(tower: str, size_px: int) -> None:
    exact = small_mambavision() if tower == "mambavision" else student("mamba_tiny").model.visual
    exact = copy.deepcopy(exact).eval()
    images = torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = exact(images), copy.deepcopy(exact).bfloat16()(images.bfloat16())
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float(), expected).min() > 0.99


@pytest.mark.parametrize("name", SMALL)
def test_small_students_export_to_onnx(name: str, tmp_path: object) -> None:
    visual = fold(student(name).model).visual
    images, _ = batch(student(name), num=2)
    path = f"{tmp_path}/image.onnx"
    torch.onnx.export(visual, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = visual(images)
    assert F.cosine_similarity(torch.from_numpy(got), expected).min() > 1 - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_students_compile(name: str) -> None:
    visual = copy.deepcopy(student(name).model.visual).eval()
    images, _ = batch(student(name))
    with torch.no_grad():
        expected = visual(images)
        got = torch.compile(visual, fullgraph=True)(images)
    assert F.cosine_similarity(got, expected).min() > 1 - 1e-6


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json"])
def test_a_student_whose_files_are_cut_off_is_a_sentence(tmp_path: Path, name: str) -> None:
    students.create("vit_tiny").save(tmp_path / "student")
    file = tmp_path / "student" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match=f"student {tmp_path}/student: open_clip cannot build it: .*are whole"):
        students.create(str(tmp_path / "student"))
