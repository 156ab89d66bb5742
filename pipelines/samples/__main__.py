"""The bundled samples: emoji in tars, and two small CLIP teachers and a small CoCa trained on them.

Command: make samples
Machine: Debian or Ubuntu with its package archive; 2 CPU cores, about 25 minutes.
"""

import argparse
import functools
import json
import multiprocessing
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.samples import emoji
from pipelines.samples.models import MODELS, VOCABULARY, VOCABULARY_SIZE, train
from pipelines.samples.pictures import Pictures, read_pictures
from pipelines.samples.vocabulary import learn_vocabulary
from reinforce.models.open_clip import open_clip

SEED = 0
LICENSES = {"LICENSE-OFL.txt": "fonts-noto-color-emoji", "LICENSE-UNICODE.txt": "unicode-cldr-core"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.samples", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder that is written (default: samples)")
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        print("fetching the font and its names from Debian")
        root = Path(folder)
        emoji.fetch(root)
        emoji.write_tars(root, out, SEED)
        for name, package in LICENSES.items():
            (out / name).write_text(license_text(root / "usr/share/doc" / package / "copyright"))
    captions = (c for captions in read_train(out).captions for c in captions)
    vocabulary = learn_vocabulary(captions, VOCABULARY_SIZE)
    for name in MODELS:
        (out / "models" / name).mkdir(parents=True, exist_ok=True)
        (out / "models" / name / VOCABULARY).write_bytes(vocabulary)
    # A model trains on one thread, and the CoCa starts from the ViT's tower.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(functools.partial(train_all, out), [["teacher_vit", "coca"], ["teacher_conv"]]))
    measured = measure(out)
    (out / "measured.json").write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n")
    print(f"{out}: {measured['num_samples']}; {measured['teachers']}; see {out / 'measured.json'}")


def train_all(out: Path, names: list[str]) -> None:
    for name in names:
        train(name, read_train(out), out / "models" / name, SEED)


def read_train(out: Path) -> Pictures:
    return read_pictures(sorted((out / "train").glob("*.tar")))


def license_text(copyright_file: Path) -> str:
    """A Debian copyright file; of one with several licences, the stanza of the SIL OFL and who holds the rights."""
    text = copyright_file.read_text("utf-8")
    start = text.find("License:   SIL-1.1\n This")
    if start < 0:
        return text
    holders = text[text.index("Copyright:", text.index("fonts/*\n")) : text.index("License:   SIL-1.1")]
    return holders + "\n" + re.sub(r"(?m)^ \.?", "", text[start:].partition("\n")[2])


def measure(out: Path) -> dict[str, Any]:
    """What the models do on the held-out pictures, as plain numbers and texts."""
    heldout = read_pictures([out / "heldout/00000.tar"])
    phrases = [captions[0] for captions in heldout.captions]
    written = write_captions(out, heldout)
    return {
        "num_samples": {"train": len(read_train(out).keys), "heldout": len(phrases)},
        "teachers": {name: retrieval(out, name, heldout) for name in MODELS if not MODELS[name].is_coca},
        "coca_word_f1": round(sum(map(word_f1, phrases, written)) / len(phrases), 3),
        "coca_captions": [
            {"key": key, "phrase": phrase, "written": caption}
            for key, phrase, caption in zip(heldout.keys, phrases, written, strict=True)
        ],
    }


@torch.inference_mode()
def retrieval(out: Path, name: str, pictures: Pictures) -> dict[str, float]:
    """Recall at 1 and 5 of a picture's phrase among all, and of the picture among all; and how often a matching pair
    is more alike than a pair with another phrase."""
    model, tokenizer = load(out, name)
    images = model.encode_image(MODELS[name].normalise(pictures.whole(MODELS[name].image_px)), normalize=True)
    texts = model.encode_text(tokenizer([captions[0] for captions in pictures.captions]), normalize=True)
    alike = images @ texts.T
    own = torch.arange(len(alike))

    def recall(of: Tensor, k: int) -> float:
        return round((of.topk(k).indices == own[:, None]).any(1).float().mean().item(), 3)

    pairs = len(alike) * (len(alike) - 1)
    return {
        "image_to_text_r1": recall(alike, 1),
        "image_to_text_r5": recall(alike, 5),
        "text_to_image_r1": recall(alike.T, 1),
        "text_to_image_r5": recall(alike.T, 5),
        "matching_above_other": round((alike.diagonal()[:, None] > alike).sum().item() / pairs, 3),
    }


@torch.inference_mode()
def write_captions(out: Path, pictures: Pictures) -> list[str]:
    """The most probable words of the CoCa, one after the other, without a cache: a look at it, not the writer's way."""
    model, tokenizer = load(out, "coca")
    memory = model(MODELS["coca"].normalise(pictures.whole(MODELS["coca"].image_px)))
    tokens = torch.full((len(pictures.keys), 1), tokenizer.sot_token_id)
    while tokens.shape[1] < model.context_length and not (tokens == tokenizer.eot_token_id).any(1).all():
        step = model(None, tokens, memory["image_features"], memory["image_embs"], output_labels=False)
        tokens = torch.cat([tokens, step["logits"][:, -1].argmax(-1, keepdim=True)], 1)
    return [tokenizer.decode(row[1:]).partition("<end_of_text>")[0].strip() for row in tokens.tolist()]


def word_f1(phrase: str, written: str) -> float:
    """Harmonic mean of how many words of each are in the other, the small ones and the templates left out."""
    small = set(re.findall(r"\w+", f"{emoji.TEMPLATES} the with and"))
    wanted, got = (set(re.findall(r"\w+", text.lower())) - small for text in (phrase, written))
    return 2 * len(wanted & got) / (len(wanted) + len(got)) if wanted and got else 0.0


def load(out: Path, name: str) -> tuple[Any, Any]:
    folder = out / "models" / name
    model = open_clip.create_model(f"local-dir:{folder}", output_dict=True).eval()
    return model, open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(folder / VOCABULARY))


if __name__ == "__main__":
    main()
