"""The cached decoding writes what open_clip's model, run on the whole text at every step, would write."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reinforce.config import Captioner
from reinforce.errors import ConfigError
from reinforce.models import coca
from reinforce.models.coca import Decoder, caption_text
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import open_clip

SOT, EOT, VOCAB = 58, 59, 60
SAMPLE_MODEL = Path(__file__).parent.parent / "samples" / "models" / "coca"


def config(**knobs: Any) -> Captioner:
    return Captioner(model="coca_ViT-B-32", **knobs)


def randomised(model: Any, seed: int) -> Any:
    """Weights that make captions differ: open_clip leaves CoCa's head unset, and its own initialisation is too flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim >= 2:
                std = 1.0 if "embedding" in name or "query" in name else weights.shape[-1] ** -0.5
                weights.normal_(std=std, generator=generator)
            elif "ln_" not in name:
                weights.normal_(std=0.1, generator=generator)
        width = model.text_decoder.text_projection.shape[0]
        model.text_decoder.text_projection.normal_(std=2 * width**-0.5, generator=generator)
    return model.eval()


def tiny_coca(
    seed: int = 0, text: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, **knobs: Any
) -> Any:
    width = (decoder or {}).get("width", 32)
    vision_cfg = {"image_size": 32, "layers": 1, "width": 48, "head_width": 16, "patch_size": 8}
    pooling = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 9, "output_tokens": True}
    text_cfg = {"context_length": 20, "vocab_size": VOCAB, "width": 32, "heads": 4, "layers": 2}
    model = open_clip.CoCa(
        embed_dim=width,
        vision_cfg=vision_cfg | pooling,
        text_cfg=text_cfg | {"embed_cls": True, "output_tokens": True} | (text or {}),
        multimodal_cfg=text_cfg | {"width": width, "layers": 3} | (decoder or {}),
        **knobs,
    )
    return randomised(model, seed)


SHAPES: dict[str, dict[str, Any]] = {
    "as published": {},
    "quick_gelu": {"quick_gelu": True},
    "layer scale": {"text": {"ls_init_value": 0.5}, "decoder": {"ls_init_value": 0.5}},
    "no class token": {"text": {"embed_cls": False}},
    "wide and narrow": {"text": {"width": 64, "heads": 2, "mlp_ratio": 2}, "decoder": {"width": 64, "heads": 8}},
    "one layer": {"text": {"layers": 1}, "decoder": {"layers": 1}},
}


def generate(
    model: Any, images: Tensor, knobs: Captioner, uniforms: np.ndarray, sot: int = SOT, eot: int = EOT
) -> Tensor:
    return Decoder(model, knobs, sot, eot).generate(images, uniforms)


def choose(logits: Tensor, uniforms: Tensor, knobs: Captioner) -> Tensor:
    """Among the whole vocabulary. Fewer candidates say the same, or that they are too few."""
    chosen, enough = coca.choose(logits, uniforms, knobs)
    assert enough
    for few in (1, 4, 300):
        chosen_of_few, enough = coca.choose(logits, uniforms, knobs, few)
        assert not enough or torch.equal(chosen_of_few, chosen)
    return chosen


def random_images(num: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def random_uniforms(num: int, knobs: Captioner, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num, knobs.num_captions, knobs.max_tokens))


@torch.inference_mode()
def open_clip_logits(model: Any, image_embs: Tensor, tokens: Tensor) -> Tensor:
    """Tokens (B, T) -> logits (B, T, V) of open_clip's own forward pass."""
    num = tokens.shape[1]
    if model.text.cls_emb is None:  # without class token open_clip takes texts of full length only
        tokens = torch.nn.functional.pad(tokens, (0, model.text.context_length - num), value=model.pad_id)
    answer = model(None, tokens, image_latent=image_embs, image_embs=image_embs, output_labels=False)
    logits: Tensor = answer["logits"][:, :num].float()
    return logits


@torch.inference_mode()
def uncached(
    model: Any, images: Tensor, knobs: Captioner, uniforms: np.ndarray, sot: int = SOT, eot: int = EOT
) -> Tensor:
    """The plain definition: each caption has its own image, all of it is run at every step, none stops early."""
    image_embs = model(images)["image_embs"].repeat_interleave(knobs.num_captions, dim=0)
    numbers = torch.from_numpy(uniforms).flatten(0, 1)
    tokens = torch.full((len(image_embs), 1), sot)
    for length in range(1, knobs.max_tokens):
        logits = open_clip_logits(model, image_embs, tokens)[:, -1].clone()
        logits[:, model.pad_id] = -math.inf
        if length < knobs.min_tokens:
            logits[:, eot] = -math.inf
        chosen = choose(logits, numbers[:, length], knobs)
        if length == knobs.max_tokens - 1:
            chosen = torch.full_like(chosen, eot)
        ended = (tokens == eot).any(dim=1)
        tokens = torch.cat([tokens, chosen.where(~ended, model.pad_id)[:, None]], dim=1)
    return tokens.unflatten(0, uniforms.shape[:2])


@torch.inference_mode()
def step_logits(model: Any, images: Tensor, tokens: Tensor) -> Tensor:
    """Tokens (B, C, T) -> logits (B, C, T, V) of the cached decoding, one token at a time."""
    image_embs = model(images)["image_embs"]
    image = [coca._image_keys_values(block, image_embs) for block in model.text_decoder.cross_attn]
    found = []
    for fixed in (False, True):
        state = coca._State(model, image, torch.zeros(tokens.shape), fixed)
        steps = [coca._logits(model, tokens[..., t], torch.tensor([t]), state) for t in range(tokens.shape[2])]
        found.append(torch.stack(steps, dim=2).float())
    narrow = images.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(*found, atol=0.3 if narrow else 2e-5, rtol=0)
    return found[0]


@torch.inference_mode()
def assert_logits_equal(model: Any, images: Tensor, tokens: Tensor, tolerance: float) -> None:
    cached, image_embs = step_logits(model, images, tokens), model(images)["image_embs"]
    for c in range(tokens.shape[1]):
        expected = open_clip_logits(model, image_embs, tokens[:, c])
        assert expected.std() > 0.5  # not flat, so that the comparison means something
        torch.testing.assert_close(cached[:, c], expected, atol=tolerance, rtol=0)


def random_tokens(*shape: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_open_clip(shape: str) -> None:
    model = tiny_coca(**SHAPES[shape])
    assert_logits_equal(model, random_images(3), random_tokens(3, 4, 20), tolerance=2e-5)


def test_logits_in_bfloat16_are_those_of_open_clip_but_for_rounding() -> None:
    model, images, tokens = tiny_coca(), random_images(3), random_tokens(3, 4, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert_logits_equal(model, images, tokens, tolerance=0.3)
    assert_logits_equal(model.bfloat16(), images.bfloat16(), tokens, tolerance=0.3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", ["top_p", "top_k", "greedy"])
def test_tokens_are_those_of_the_uncached_model(shape: str, sampling: str) -> None:
    model, images = tiny_coca(**SHAPES[shape]), random_images(4)
    knobs = config(sampling=sampling, num_captions=3, max_tokens=16, top_k=7, temperature=1.3)
    uniforms = random_uniforms(4, knobs)
    tokens = generate(model, images, knobs, uniforms)
    assert torch.equal(tokens, uncached(model, images, knobs, uniforms))
    assert len(tokens.flatten(0, 1).unique(dim=0)) >= (4 if sampling == "greedy" else 12)


def check_published(name: str) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None).eval()
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    knobs = config(num_captions=2, max_tokens=9)
    images, uniforms = random_images(2, size=224), random_uniforms(2, knobs)
    tokens = generate(model, images, knobs, uniforms, 49406, 49407)
    assert_logits_equal(model, images, tokens[..., :-1], tolerance=2e-4)
    assert torch.equal(tokens, uncached(model, images, knobs, uniforms, 49406, 49407))


@pytest.mark.heavy
def test_published_architecture() -> None:
    check_published("coca_ViT-B-32")


@pytest.mark.slow
def test_largest_published_architecture() -> None:
    check_published("coca_ViT-L-14")


@pytest.mark.skipif(not SAMPLE_MODEL.is_dir(), reason="the sample captioner has not been made")
@pytest.mark.parametrize("sampling", ["top_p", "greedy"])
def test_sample_captioner(sampling: str) -> None:
    knobs = Captioner(model=f"local-dir:{SAMPLE_MODEL}", num_captions=3, max_tokens=20, sampling=sampling)
    frozen = FrozenModel(knobs, torch.device("cpu"))
    sot, eot = frozen.tokenizer.sot_token_id, frozen.tokenizer.eot_token_id
    images, uniforms = random_images(3, size=frozen.image_px), random_uniforms(3, knobs)
    tokens = generate(frozen.model, images, knobs, uniforms, sot, eot)
    assert torch.equal(tokens, uncached(frozen.model, images, knobs, uniforms, sot, eot))
    assert any(caption_text(row, frozen.tokenizer, sot, eot) for row in tokens.flatten(0, 1))


def test_every_caption_ends_once_and_is_padded() -> None:
    model = tiny_coca()
    with torch.no_grad():  # the pad becomes a likely token, which must still never be chosen
        model.text_decoder.text_projection[:, model.pad_id] = model.text_decoder.text_projection[:, 5]
    knobs = config(num_captions=5, max_tokens=14, min_tokens=4, temperature=2.0)
    tokens = generate(model, random_images(40), knobs, random_uniforms(40, knobs)).flatten(0, 1)
    assert tokens.dtype == torch.int64 and tokens.shape == (200, 14)
    ends = (tokens == EOT).int().argmax(dim=1)
    assert ends.min() == 4 and ends.max() == 13 and len(ends.unique()) > 5
    for row, end in zip(tokens, ends.tolist(), strict=True):
        assert row[0] == SOT and row[end] == EOT
        assert (
            (row[1:end] != EOT).all() and (row[1:end] != model.pad_id).all() and (row[end + 1 :] == model.pad_id).all()
        )


@pytest.mark.parametrize("min_tokens", [1, 6])
def test_stops_when_all_captions_have_ended(min_tokens: int) -> None:
    model, images = tiny_coca(), random_images(4)
    with torch.no_grad():  # the end is always by far the likeliest token
        model.text_decoder.ln_final.bias.fill_(1.0)
        model.text_decoder.text_projection[:, EOT] = 2.0
    knobs = config(num_captions=2, max_tokens=20, min_tokens=min_tokens)
    steps: list[int] = []
    hook = model.text_decoder.ln_final.register_forward_hook(lambda *_: steps.append(1))
    tokens = generate(model, images, knobs, random_uniforms(4, knobs))
    hook.remove()
    assert len(steps) == min_tokens
    assert (tokens[..., min_tokens] == EOT).all()
    assert torch.equal(tokens, uncached(model, images, knobs, random_uniforms(4, knobs)))


def test_candidates_that_are_too_few_are_made_more_and_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coca, "captured", lambda function, example: function)
    model = tiny_coca(text={"vocab_size": 3000}, decoder={"vocab_size": 3000})
    knobs, images = config(num_captions=3, max_tokens=8, top_p=0.999, temperature=3.0), random_images(2)
    decoder, steps = Decoder(model, knobs, SOT, EOT, graphs=True), list[int]()
    hook = model.text_decoder.ln_final.register_forward_hook(lambda *_: steps.append(1))
    tokens = decoder.generate(images, random_uniforms(2, knobs))
    first = len(steps)
    assert first == 2 * 6 or first == 3 * 6
    assert torch.equal(decoder.generate(images, random_uniforms(2, knobs)), tokens)
    assert len(steps) == first + 6
    hook.remove()
    assert torch.equal(tokens, uncached(model, images, knobs, random_uniforms(2, knobs)))
    assert torch.equal(tokens, generate(model, images, knobs, random_uniforms(2, knobs)))  # more in the step itself


def test_a_decoder_forgets_the_batch_before() -> None:
    model, knobs = tiny_coca(), config(num_captions=2, max_tokens=12)
    decoder = Decoder(model, knobs, SOT, EOT)
    for num, seed in ((4, 0), (4, 1), (2, 2), (4, 3)):
        images, uniforms = random_images(num, seed=seed), random_uniforms(num, knobs, seed)
        assert torch.equal(decoder.generate(images, uniforms), generate(model, images, knobs, uniforms))


def test_the_steps_can_be_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph is: one function of one tensor, whose copies it alone reads, and that reads and writes the same
    memory at every call."""
    taken: list[int] = []
    looked: list[int] = []

    def captured(function: Callable[[Tensor], Any], example: Tensor) -> Callable[[Tensor], Any]:
        inputs = example.clone()
        for _ in range(3):
            outputs = function(inputs)
        state = decoder._state

        def addresses() -> list[int]:
            return [t.data_ptr() for t in (state.tokens, state.ended, state.numbers, state.image[0][0])]

        before = addresses() if state else []

        def replayed(given: Tensor) -> Any:
            inputs.copy_(given)
            if state:
                taken.append(int(given))
                assert addresses() == before
                outputs.copy_(function(inputs))
            else:
                looked.append(len(given))
                for old, new in zip(outputs, function(inputs), strict=True):
                    old[0].copy_(new[0])
                    old[1].copy_(new[1])
            return outputs

        return replayed

    monkeypatch.setattr(coca, "captured", captured)
    model, knobs = tiny_coca(), config(num_captions=2, max_tokens=12)
    decoder: Any = Decoder(model, knobs, SOT, EOT, graphs=True)
    for seed in range(2):
        images, uniforms = random_images(3, seed=seed), random_uniforms(3, knobs, seed)
        assert torch.equal(decoder.generate(images, uniforms), uncached(model, images, knobs, uniforms))
    assert taken == 2 * list(range(10)) and looked == [3, 3]
    with torch.inference_mode():
        assert all(kept is seen for kept, seen in zip(decoder._state.image, decoder._look(images), strict=True))


def test_an_image_is_captioned_alike_in_any_company() -> None:
    model, images = tiny_coca(), random_images(8)
    knobs = config(num_captions=3, max_tokens=16)
    uniforms = random_uniforms(8, knobs)
    tokens = generate(model, images, knobs, uniforms)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(generate(model, images[order], knobs, uniforms[order.numpy()]), tokens[order])
    others = generate(model, images[:3], knobs, uniforms[:3])
    assert torch.equal(others, tokens[:3])


def test_captions_depend_on_the_image_and_on_the_numbers() -> None:
    model, knobs = tiny_coca(), config(num_captions=1, max_tokens=16)
    same_numbers = np.repeat(random_uniforms(1, knobs), 6, axis=0)
    by_image = generate(model, random_images(6), knobs, same_numbers)
    by_number = generate(model, random_images(1).repeat(6, 1, 1, 1), knobs, random_uniforms(6, knobs))
    assert len(by_image[:, 0].unique(dim=0)) >= 4 and len(by_number[:, 0].unique(dim=0)) == 6


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "foreign text tower": (lambda: with_text_tower(torch.nn.Identity()), {}, "text tower, which cannot be decoded"),
    "foreign blocks": (lambda: tiny_coca(text={"qk_norm": True}), {}, "blocks of kind CustomResidualAttentionBlock"),
    "looks ahead": (lambda: tiny_coca(text={"no_causal_mask": True}), {}, "no_causal_mask"),
    "too long": (tiny_coca, {"max_tokens": 21}, "20 positions, too few for max_tokens=21"),
    "no CoCa": (torch.nn.Identity, {}, "Identity and writes no captions"),
}


def with_text_tower(tower: torch.nn.Module) -> Any:
    model = tiny_coca()
    model.text = tower
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_a_sentence(case: str) -> None:
    make, knobs, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        generate(make(), random_images(1), config(**knobs), random_uniforms(1, config(**knobs)))


def place(probs: list[float], u: float, knobs: Captioner) -> tuple[list[int], list[Fraction], Fraction]:
    """The definition in exact numbers: kept tokens in order, their cumulative mass, and the place on it."""
    exact = [Fraction(p) for p in probs]
    ranked = sorted(exact, reverse=True)
    if knobs.sampling == "top_k":
        edge = ranked[min(knobs.top_k, len(ranked)) - 1]
    else:
        reached = (p for p, mass in zip(ranked, accumulate(ranked), strict=True) if mass >= Fraction(knobs.top_p))
        edge = next(reached, ranked[-1])
    kept = [token for token, p in enumerate(exact) if p >= edge]
    mass = list(accumulate(exact[token] for token in kept))
    return kept, mass, Fraction(u) * mass[-1]


LOGITS = st.lists(st.sampled_from([-30.0, -math.inf, 0.0, 1.0]) | st.floats(-8, 8, width=32), min_size=1, max_size=12)
UNIFORM = st.sampled_from([0.0, 0.5, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True)


@settings(deadline=None)
@given(LOGITS, UNIFORM, st.sampled_from(["top_p", "top_k"]), st.floats(0.01, 1), st.integers(1, 13), st.floats(0.1, 5))
def test_choose_is_its_definition(
    values: list[float], u: float, sampling: str, top_p: float, top_k: int, temperature: float
) -> None:
    logits = torch.tensor([[*values, 0.0]])
    knobs = config(sampling=sampling, top_p=top_p, top_k=top_k, temperature=temperature)
    probs = (logits[0] / temperature).softmax(dim=0).tolist()
    chosen = int(choose(logits, torch.tensor([u], dtype=torch.float64), knobs))
    # Sums in float64 may fall on either side of a threshold that they meet within rounding.
    slack = Fraction(2) ** -48
    answers = []
    for shift in (-slack, Fraction(0), slack):
        kept, mass, target = place(probs, u, knobs.model_copy(update={"top_p": Fraction(top_p) + shift}))
        starts = [Fraction(0), *mass[:-1]]
        answers += [t for t, a, b in zip(kept, starts, mass, strict=True) if a - slack <= target < b + slack]
    assert chosen in answers and probs[chosen] > 0


@pytest.mark.parametrize(("top_p", "kept"), [(0.4999, [0]), (0.5001, [0, 1]), (0.8, [0, 1]), (0.9, [0, 1, 2])])
def test_nucleus_is_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([0.5, 0.3001, 0.1999]).log()
    uniforms = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    assert choose(logits.expand(50, -1), uniforms, config(top_p=top_p)).unique().tolist() == kept


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 3.0, 1.0]])
    chosen = choose(logits, torch.tensor([0.99, 0.99], dtype=torch.float64), config(sampling="greedy"))
    assert chosen.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(temperature: float) -> None:
    """Evenly spaced numbers must hit each token in proportion to its probability, to the last of them."""
    logits = torch.tensor([2.0, 1.5, -1.0, 0.0, 1.0, -4.0])
    num = 4000
    uniforms = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    probs = (logits / temperature).softmax(dim=0)
    chosen = choose(logits.expand(num, -1), uniforms, config(top_p=1.0, temperature=temperature))
    assert (chosen.bincount(minlength=6) - probs * num).abs().max() <= 1
    chosen = choose(logits.expand(num, -1), uniforms, config(sampling="top_k", top_k=3, temperature=temperature))
    three = probs * torch.tensor([1, 1, 0, 0, 1, 0])
    assert (chosen.bincount(minlength=6) - three / three.sum() * num).abs().max() <= 1


def test_flat_and_peaked_rows_together_are_each_as_alone() -> None:
    """The nucleus of a flat row is most of a large vocabulary, that of a peaked row a single token."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2500, generator=generator) * torch.tensor([0.0, 0.01, 1.0, 4.0, 10.0, 100.0])[:, None]
    uniforms = torch.rand(6, dtype=torch.float64, generator=generator)
    for knobs in (config(), config(top_p=1.0), config(sampling="top_k", top_k=300)):
        together = choose(logits, uniforms, knobs)
        alone = [int(choose(logits[i : i + 1], uniforms[i : i + 1], knobs)) for i in range(6)]
        assert together.tolist() == alone
        for i in range(6):
            kept, mass, target = place(logits[i].softmax(dim=0).tolist(), float(uniforms[i]), knobs)
            assert alone[i] == kept[next(n for n, m in enumerate(mass) if m > target)]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a red bicycle against a wall", "a red bicycle against a wall"),
        ("a red bicycle . a wall . more", "a red bicycle"),
        ("", ""),
        (". nothing before it", ""),
        ("  caf\u00e9 \u2615  ", "caf\u00e9 \u2615"),
    ],
)
def test_caption_text(text: str, caption: str) -> None:
    tokenizer = open_clip.get_tokenizer("coca_ViT-B-32")
    tokens = tokenizer([text])[0]  # start, text, end, pads
    assert caption_text(tokens, tokenizer, tokenizer.sot_token_id, tokenizer.eot_token_id) == caption


def test_caption_text_without_end_or_with_words_before_the_start() -> None:
    tokenizer = open_clip.get_tokenizer("coca_ViT-B-32")
    sot, eot = tokenizer.sot_token_id, tokenizer.eot_token_id
    words = tokenizer.encode("a dog")
    for tokens in ([sot, *words], [sot, *words, eot], [*tokenizer.encode("prompt"), sot, *words, eot, *words, eot]):
        assert caption_text(torch.tensor(tokens), tokenizer, sot, eot) == "a dog"
