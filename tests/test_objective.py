"""A step in pieces has the gradients of the step as a whole, and the loss is the sum it says."""

from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Reinforced
from train import students
from train.config import TrainConfig
from train.data.loader import Batch, Loader
from train.data.mixture import source_of
from train.data.sources import Source
from train.losses import TeacherPairs, pair_losses
from train.objective import ClipTrainee, Outputs, backward


def training(made: Reinforced, **changes: object) -> tuple[TrainConfig, Source, ClipTrainee]:
    config = TrainConfig(student=made.student, shards=made.shards, store=made.store, precision="fp32", distill=0.7)
    config = config.but(**changes)
    source = source_of(config)
    return config, source, ClipTrainee(students.create(config.student), source.teachers, config).train()


def batches(config: TrainConfig, source: Source, accum_freq: int) -> list[Batch]:
    student = students.create(config.student)
    loader = Loader(source, student.image_px, student.tokenizer, 16, 4, 0, accum_freq)
    return list(islice(loader.batches(0, 1), accum_freq))


def gradients(made: Reinforced, accum_freq: int, **changes: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    config, source, trainee = training(made, **changes)

    parts = backward(trainee, batches(config, source, accum_freq), trainee.loss, seed=3)
    return {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}, parts


@pytest.mark.parametrize("accum_freq", [2, 4])
@pytest.mark.parametrize("changes", [{"feature_mse": 0.5}, {"captions": "mix"}, {"store": None, "distill": 0.0}])
def test_a_step_in_pieces_has_the_gradients_of_the_whole(
    reinforced: Reinforced, accum_freq: int, changes: dict[str, object]
) -> None:
    whole, whole_parts = gradients(reinforced, 1, **changes)
    pieces, pieces_parts = gradients(reinforced, accum_freq, **changes)
    assert whole.keys() == pieces.keys()
    assert any("heads" in name for name in whole) == ("feature_mse" in changes)
    assert "logit_scale" in "".join(whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in whole_parts.items():
        torch.testing.assert_close(pieces_parts[name], value, rtol=1e-5, atol=1e-6)


def test_outputs_of_pieces_are_those_of_the_whole(reinforced: Reinforced) -> None:
    """Texts come set by set: the second text set of the first piece stands beside that of the second."""
    config, source, trainee = training(reinforced, feature_mse=1.0)
    trainee.eval()
    pieces = batches(config, source, 2)
    [whole] = batches(config, source, 1)

    def outputs(batch: Batch) -> Outputs:
        with torch.no_grad():
            return trainee(batch.images, torch.stack(list(batch.tokens.values())))

    made, joined = outputs(whole), Outputs.cat([outputs(piece) for piece in pieces])
    assert made.text["features"].shape == (2, 16, 12) and made.image["guess/conv"].shape == (16, 24)
    assert made.image.keys() == made.text.keys() == {"features", "guess/vit", "guess/conv"}
    for side in ("image", "text"):
        for name, tensor in getattr(made, side).items():
            torch.testing.assert_close(getattr(joined, side)[name], tensor)
    assert torch.equal(joined.logit_scale, made.logit_scale)
    halved = made.map(lambda x: x / 2)
    assert all(torch.equal(half, full / 2) for half, full in zip(halved.tensors, made.tensors, strict=True))


def test_both_passes_over_a_piece_draw_the_same_random_numbers(reinforced: Reinforced) -> None:
    """Dropout: were the second pass to draw anew, features and gradients would belong to two different students."""
    config, source, trainee = training(reinforced)
    seen: list[Tensor] = []
    trainee.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    trainee.model.visual.conv1.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.3))
    backward(trainee, batches(config, source, 2), trainee.loss, seed=3)
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    assert not torch.equal(first, second)


def test_batch_norms_count_each_piece_once(reinforced: Reinforced) -> None:
    config, source, trainee = training(reinforced)
    norm = nn.BatchNorm2d(32, momentum=0.5)
    trainee.model.visual.conv1.register_forward_hook(lambda module, inputs, output: norm(output))
    trainee.norm = norm
    pieces = batches(config, source, 2)
    means = []
    for piece in pieces:
        pixels = trainee.pixels(piece.images)
        with torch.no_grad():
            patches = nn.functional.conv2d(pixels, trainee.model.visual.conv1.weight, stride=16)
            means.append(patches.mean((0, 2, 3)))
    backward(trainee, pieces, trainee.loss, seed=3)
    torch.testing.assert_close(norm.running_mean, 0.5 * (0.5 * means[0]) + 0.5 * means[1], rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.5


def test_the_loss_is_the_weighted_sum_over_text_sets(reinforced: Reinforced) -> None:
    config, source, trainee = training(reinforced, feature_mse=2.0)
    (batch,) = batches(config, source, 1)
    outputs = trainee(batch.images, torch.stack(list(batch.tokens.values())))
    loss, parts = trainee.loss(outputs, batch)
    contrastive = distill = 0.0
    for i, text_set in enumerate(("original", "coca")):
        teachers = [
            TeacherPairs(batch.image_targets[t], batch.text_targets[text_set][t], source.teachers[t].logit_scale)
            for t in ("vit", "conv")
        ]
        image, text = outputs.image["features"], outputs.text["features"][i]
        found = pair_losses(image, text, outputs.logit_scale, teachers)
        contrastive, distill = contrastive + found.contrastive.item(), distill + found.distill.item()
    assert parts["contrastive"].item() == pytest.approx(contrastive, rel=1e-5)
    assert parts["distill"].item() == pytest.approx(distill, rel=1e-5)
    wanted = 0.3 * contrastive + 0.7 * distill + 2 * parts["feature_mse"].item()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_pixels_are_normalised_as_the_student_wants_them(reinforced: Reinforced) -> None:
    config, source, trainee = training(reinforced)
    (batch,) = batches(config, source, 1)
    seen: list[Tensor] = []
    trainee.model.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainee(batch.images, batch.tokens["original"][None])
    wanted = (batch.images[3, 5, 7].float() / 255 - 0.4) / 0.3
    torch.testing.assert_close(seen[0][3, :, 5, 7], wanted)
