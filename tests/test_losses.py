"""The losses against their definitions, written out slowly in float64, and against open_clip's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reinforce.models.open_clip import open_clip
from train.losses import FeatureHeads, TeacherPairs, feature_mse, pair_losses


def units(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def pairs(num: int, widths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, list[TeacherPairs]]:
    teachers = [
        TeacherPairs(units(seed + 10 * k, num, width), units(seed + 10 * k + 1, num, width), 20.0 + 30 * k)
        for k, width in enumerate(widths, 1)
    ]
    return units(seed, num, 8), units(seed + 1, num, 8), teachers


def slow(
    image: Tensor, text: Tensor, scale: float, teachers: list[TeacherPairs], weight: float
) -> tuple[float, float, float]:
    """Loss and its parts, in loops, with nothing of the code under test."""

    def softmax(numbers: list[float]) -> np.ndarray:
        e = np.exp(np.array(numbers) - max(numbers))
        return e / e.sum()

    num, loss, contrastive, distill = len(image), 0.0, 0.0, 0.0
    for x, y, side in ((image, text, 0), (text, image, 1)):
        for i in range(num):
            p = softmax([scale * float(x[i] @ y[j]) for j in range(num)])
            contrastive -= np.log(p[i])
            targets = []
            for t in teachers:
                u, v = (t.image, t.text) if side == 0 else (t.text, t.image)
                if u[i].isnan().any():
                    continue
                seen = [j for j in range(num) if not v[j].isnan().any()]
                answers = np.zeros(num)
                if t.logit_bias is None:
                    answers[seen] = softmax([t.logit_scale * float(u[i] @ v[j]) for j in seen])
                else:
                    sigmoids = [1 / (1 + np.exp(-t.logit_scale * float(u[i] @ v[j]) - t.logit_bias)) for j in seen]
                    answers[seen] = np.array(sigmoids) / sum(sigmoids)
                targets.append(answers)
                assert abs(targets[-1].sum() - 1) < 1e-12  # of rows of texts too: not the transpose of the other side's
            soft = -float((np.mean(targets, axis=0) * np.log(p)).sum()) if targets else 0.0
            share = weight if targets else 0.0
            distill += soft
            loss += share * soft - (1 - share) * np.log(p[i])
    return loss / (2 * num), contrastive / (2 * num), distill / (2 * num)


@given(
    num=st.integers(1, 9),
    widths=st.lists(st.integers(2, 9), max_size=3),
    weight=st.floats(0, 1),
    block_rows=st.integers(1, 10),
    seed=st.integers(0, 1000),
    biases=st.lists(st.none() | st.floats(-60, 0), min_size=3, max_size=3),
    unseen=st.lists(st.integers(0, 511), min_size=3, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_they_are_what_they_say(
    *, num: int, widths: list[int], weight: float, block_rows: int, seed: int, biases: list, unseen: list[int]
) -> None:
    """`unseen`: the pairs that each teacher has not seen, as the bits of a number."""
    image, text, teachers = pairs(num, widths, seed)
    for k, teacher in enumerate(teachers):
        rows = [i for i in range(num) if unseen[k] >> i & 1]
        teacher.image[rows] = teacher.text[rows] = torch.nan
        teachers[k] = replace(teacher, logit_bias=biases[k], partial=True)
    losses = pair_losses(image, text, torch.tensor(14.0, dtype=torch.float64), teachers, weight, block_rows)
    loss, contrastive, distill = slow(image, text, 14.0, teachers, weight)
    assert losses.contrastive.item() == pytest.approx(contrastive, abs=1e-9)
    assert losses.distill.item() == pytest.approx(distill, abs=1e-9)
    assert losses.loss.item() == pytest.approx(loss, abs=1e-9)


def test_without_gaps_partial_changes_nothing() -> None:
    image, text, teachers = pairs(9, [5, 6])
    scale = torch.tensor(14.0, dtype=torch.float64)
    whole = pair_losses(image, text, scale, teachers, 0.6)
    partial = pair_losses(image, text, scale, [replace(t, partial=True) for t in teachers], 0.6)
    assert (whole.loss, whole.distill) == (partial.loss, partial.distill)
    assert whole.loss == pytest.approx((0.4 * whole.contrastive + 0.6 * whole.distill).item(), abs=1e-12)


def test_a_gap_of_a_teacher_that_has_seen_all_is_no_gap() -> None:
    """Lost embeddings are NaN: a training must end, and not pass over them."""
    image, text, teachers = pairs(9, [5])
    teachers[0].image[3] = torch.nan
    assert pair_losses(image, text, torch.tensor(14.0), teachers, 0.6).loss.isnan()
    assert feature_mse({"a": units(1, 9, 5)}, {"a": teachers[0].image}).isnan()


def test_a_siglip_that_is_unsure_of_all_answers_as_a_clip() -> None:
    """Far below 0 a sigmoid is an exponential, and over their sum these are a softmax, whatever the bias."""
    image, text, [teacher] = pairs(9, [5])
    scale = torch.tensor(14.0, dtype=torch.float64)
    clip, siglip = (
        pair_losses(image, text, scale, [replace(teacher, logit_bias=bias)], 1.0).loss for bias in (None, -99.0)
    )
    assert siglip.item() == pytest.approx(clip.item(), abs=1e-9)


def test_with_one_teacher_it_is_open_clips_distillation() -> None:
    image, text, teachers = pairs(11, [16])
    scale = torch.tensor(30.0, dtype=torch.float64)
    theirs = open_clip.DistillClipLoss()(
        image, text, scale, teachers[0].image, teachers[0].text, teachers[0].logit_scale, output_dict=True
    )
    ours = pair_losses(image, text, scale, teachers)
    torch.testing.assert_close(ours.contrastive, theirs["contrastive_loss"])
    torch.testing.assert_close(ours.distill, theirs["distill_loss"])


def gradients(block_rows: int) -> list[Tensor]:
    image, text, teachers = pairs(10, [5, 6])
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(9.0, dtype=torch.float64).requires_grad_()]
    return list(torch.autograd.grad(3 * pair_losses(image, text, leaves[2], teachers, 0.7, block_rows).loss, leaves))


def test_gradients_do_not_depend_on_the_blocks() -> None:
    for blocked, whole in zip(gradients(3), gradients(10), strict=True):
        torch.testing.assert_close(blocked, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("widths", "weight"), [([5, 4], 0.0), ([5, 4], 0.6), ([3], 1.0), ([], 0.0), ([], 0.4)])
def test_gradients_are_those_of_the_definition(widths: list[int], weight: float) -> None:
    image, text, teachers = pairs(6, widths)
    scale = torch.tensor(9.0, dtype=torch.float64)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return 2 * pair_losses(image, text, scale, teachers, weight, block_rows=4).loss

    leaves = [leaf.requires_grad_() for leaf in (image, text, scale)]
    assert torch.autograd.gradcheck(loss, leaves)


def test_only_the_loss_has_gradients_and_only_where_they_are_asked_for() -> None:
    image, text, teachers = pairs(6, [5])
    scale = torch.tensor(9.0, dtype=torch.float64)
    losses = pair_losses(image, text.requires_grad_(), scale, teachers, 0.5)
    assert losses.loss.requires_grad and not losses.contrastive.requires_grad and not losses.distill.requires_grad
    with torch.no_grad():
        assert not pair_losses(image, text, scale, teachers, 0.5).loss.requires_grad


def test_memory_grows_with_the_batch_and_not_its_square() -> None:
    def kept(num: int) -> int:
        image, text, teachers = pairs(num, [8])
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            pair_losses(
                *(image.requires_grad_(), text.requires_grad_(), torch.tensor(9.0).requires_grad_()),
                *(teachers, 0.5, num // 8),
            )
        return sum(sizes)

    assert kept(512) < 2.5 * kept(256)


def test_similarities_are_float32_under_autocast() -> None:
    image, text, teachers = pairs(12, [8])
    halves = [TeacherPairs(t.image.bfloat16(), t.text.bfloat16(), t.logit_scale) for t in teachers]
    exact = [TeacherPairs(t.image.double(), t.text.double(), t.logit_scale) for t in halves]
    with torch.autocast("cpu", torch.bfloat16):
        losses = pair_losses(image.float(), text.float(), torch.tensor(100.0), halves)
    assert losses.distill.dtype == torch.float32
    truth = pair_losses(image.float().double(), text.float().double(), torch.tensor(100.0), exact)
    assert losses.distill.item() == pytest.approx(truth.distill.item(), rel=1e-5)


def test_feature_distance() -> None:
    target = units(0, 5, 6)
    assert feature_mse({"a": 3 * target}, {"a": target}).item() == pytest.approx(0)
    assert feature_mse({"a": -target}, {"a": target}).item() == pytest.approx(4)
    guess = units(1, 5, 6)
    expected = (guess - target).square().sum(-1).mean().item()
    assert feature_mse({"a": guess}, {"a": target}).item() == pytest.approx(expected)
    mean = target.mean(0).expand_as(target)
    spread = (target - mean).square().sum(-1).mean().item()
    assert feature_mse({"a": guess}, {"a": target}, balanced=True).item() == pytest.approx(expected / spread)


def test_feature_distance_of_each_sample_is_the_mean_over_the_teachers_that_have_seen_it() -> None:
    a, b = units(0, 3, 4), units(1, 3, 6)
    guesses = {"a": units(2, 3, 4), "b": units(3, 3, 6)}
    of_a, of_b = ((guesses[name] - x).square().sum(-1) for name, x in (("a", a), ("b", b)))
    targets = {"a": a.clone(), "b": b.clone()}
    targets["a"][1:], targets["b"][2] = torch.nan, torch.nan
    expected = ((of_a[0] + of_b[0]) / 2 + of_b[1] + 0) / 3
    assert feature_mse(guesses, targets, partial={"a", "b"}).item() == pytest.approx(expected.item())


def test_heads_have_the_teachers_widths() -> None:
    heads = FeatureHeads(8, {"a": 3, "b": 5}, {"b": 5})
    assert {
        (side, name): head(torch.ones(2, 8)).shape[1]
        for side in ("image", "text")
        for name, head in getattr(heads, side).items()
    } == {("image", "a"): 3, ("image", "b"): 5, ("text", "b"): 5}
