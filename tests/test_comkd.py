"""ComKD-CLIP's terms against slow definitions, and at the edges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.comkd import terms as comkd
from train.comkd.terms import EduAttention, Head, Projector

WIDTH, CLASSES = 8, 5


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_align(student: np.ndarray, teacher: np.ndarray) -> float:
    """Feature by feature and image by image, in float64."""
    total = 0.0
    for of_student, of_teacher in zip(student.T.tolist(), teacher.T.tolist(), strict=True):
        means = [math.fsum(values) / len(values) for values in (of_student, of_teacher)]
        variances = [
            math.fsum((value - mean) ** 2 for value in values) / len(values)
            for values, mean in zip((of_student, of_teacher), means, strict=True)
        ]
        total += abs(means[0] - means[1]) + abs(variances[0] - variances[1])
    return total


@pytest.mark.parametrize("num", [2, 7, 64])
def test_if_align_is_the_slow_definition(num: int) -> None:
    student, teacher = units(num, WIDTH, seed=1), units(num, WIDTH, seed=2)
    assert comkd.if_align(student, teacher).item() == pytest.approx(
        slow_align(student.numpy(), teacher.numpy()), rel=1e-5
    )
    assert comkd.if_align(teacher, teacher[torch.randperm(num)]).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("num", [2, 7, 64])
def test_if_align_over_the_width_is_that_of_each_image(num: int) -> None:
    student, teacher = units(num, WIDTH, seed=1), units(num, WIDTH, seed=2)
    slow = slow_align(student.numpy().T, teacher.numpy().T)
    assert comkd.if_align(student, teacher, "width").item() == pytest.approx(slow, rel=1e-5)
    assert comkd.if_align(student, teacher, "width", average=True).item() == pytest.approx(slow / num, rel=1e-5)
    shuffled = teacher[:, torch.randperm(WIDTH)]
    assert comkd.if_align(teacher, shuffled, "width").item() == pytest.approx(0, abs=1e-5)
    of_batch = comkd.if_align(student, teacher, average=True)
    assert of_batch.item() == pytest.approx(comkd.if_align(student, teacher).item() / WIDTH, rel=1e-5)


def test_a_batch_of_one_has_no_variance_and_its_own_mean() -> None:
    student, teacher = units(1, WIDTH, seed=1).requires_grad_(), units(1, WIDTH, seed=2)
    loss = comkd.if_align(student, teacher)
    assert loss.item() == pytest.approx((student - teacher).abs().sum().item())
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.any()


def test_refinement_is_the_slow_definition_and_nothing_between_equals() -> None:
    q_s, q_t, tau = torch.randn(3, CLASSES), 4 * torch.randn(3, CLASSES), 2.0
    p_s, p_t = ((q.double() / tau).softmax(-1).numpy() for q in (q_s, q_t))
    slow = float((p_t * np.log(p_t / p_s)).sum() / 3 * tau**2)
    assert comkd.refinement(q_s, q_t, tau).item() == pytest.approx(slow, rel=1e-5)
    assert comkd.refinement(q_t + 7.0, q_t, tau).item() == pytest.approx(0, abs=1e-5)


def test_attention_is_the_slow_definition() -> None:
    attention = EduAttention(WIDTH).double()
    with torch.no_grad():
        attention.alpha.fill_(0.7)
    u, w = units(3, WIDTH).double(), units(CLASSES, WIDTH, seed=1).double()
    assert attention.scale == math.sqrt(WIDTH)
    for row, image in enumerate(u):
        scores = [(attention.query(image) @ attention.key(text)).item() / math.sqrt(WIDTH) for text in w]
        share = np.exp(scores) / np.exp(scores).sum()
        said = sum(float(s) * attention.value(text) for s, text in zip(share, w, strict=True))
        torch.testing.assert_close(attention(u, w)[row], image + 0.7 * said)


@pytest.mark.parametrize(("scale", "flat"), [(None, True), (0.03, False)])
def test_attention_begins_flat_with_the_root_of_the_width(scale: float | None, flat: bool) -> None:
    torch.manual_seed(0)
    images, classes = units(64, 128), units(10, 128, seed=1)
    attention = EduAttention(128, scale)
    weights = (attention.query(images) @ attention.key(classes).T / attention.scale).softmax(-1)
    assert (weights.max() < 1.05 * weights.min()) == flat


def test_while_alpha_is_0_the_full_head_is_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = Head(6, units(CLASSES, WIDTH), attention=False)
    full = Head(6, units(CLASSES, WIDTH), attention=True)
    full.load_state_dict(plain.state_dict(), strict=False)
    u = units(4, 6)
    projected, fused = full(u)
    assert torch.equal(fused, projected) and torch.equal(fused, plain.train()(u)[1])
    torch.testing.assert_close(projected.norm(dim=-1), torch.ones(4))


def test_gradients_reach_every_part_from_the_second_step_on() -> None:
    """At alpha 0 the attention's layers see none yet: their output is multiplied by it."""
    torch.manual_seed(0)
    head = Head(6, units(CLASSES, WIDTH), attention=True)
    assert head.attention is not None
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    target = units(4, WIDTH, seed=3) @ head.classes.T

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        comkd.refinement(10 * head(units(4, 6))[1] @ head.classes.T, 10 * target, 1.0).backward()
        optimizer.step()
        return {name: p.grad.abs().sum().item() for name, p in head.named_parameters() if p.grad is not None}

    first = step()
    assert all(value == 0 for name, value in first.items() if name.startswith("attention.") and "alpha" not in name)
    assert first["attention.alpha"] > 0 and first["projector.first.weight"] > 0 and first["projector.last.weight"] > 0
    second = step()
    layers = {name: value for name, value in second.items() if name.endswith("weight")}
    assert len(layers) == 6 and all(value > 0 for value in layers.values())


def test_a_projector_takes_a_batch_of_one_in_training() -> None:
    projector = Projector(6, WIDTH).train()
    projector(units(16, 6))
    kept = projector.norm.running_mean.clone()
    one = projector(units(1, 6))
    assert one.isfinite().all() and torch.equal(projector.norm.running_mean, kept)
    torch.testing.assert_close(one, projector.eval()(units(1, 6)))
    assert not torch.allclose(projector.train()(units(2, 6))[:1], one)
