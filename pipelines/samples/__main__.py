"""The bundled samples: emoji in tars, and two small CLIP teachers and a small CoCa trained on them.

Command: make samples
Machine: Debian or Ubuntu with its package archive; 2 CPU cores, about half an hour.
"""

import argparse
import json
import re
import tempfile
from functools import partial
from pathlib import Path

from pipelines.experiments.steps import side_by_side
from pipelines.samples import emoji
from pipelines.samples.coca import train_vit_and_coca
from pipelines.samples.measure import captions_of, measure
from pipelines.samples.models import VOCABULARY_SIZE, train_clip
from pipelines.samples.vocabulary import learn_vocabulary
from reinforce.terminal import errors_as_sentences

SEED = 0
LICENSES = {"LICENSE-OFL.txt": "fonts-noto-color-emoji", "LICENSE-UNICODE.txt": "unicode-cldr-core"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.samples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder that is written (default: samples)")
    out: Path = parser.parse_args().out
    with errors_as_sentences(), tempfile.TemporaryDirectory() as folder:
        print("fetching the font and its names from Debian")
        root = Path(folder)
        emoji.fetch(root)
        emoji.write_tars(root, out, SEED)
        for name, package in LICENSES.items():
            (out / name).write_text(license_text(root / "usr/share/doc" / package / "copyright"))
        train_models(out, root)
        measured = measure(out)
    (out / "measured.json").write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n")
    print(f"{out}: {measured['num_samples']}; {measured['teachers']}; see {out / 'measured.json'}")


def train_models(out: Path, logs: Path) -> None:
    """Train all models on `out/train` into `out/models`. `logs`: a folder for what they print."""
    tars = sorted((out / "train").glob("*.tar"))
    captions = (caption for tar in tars for _, captions in captions_of(tar) for caption in captions)
    vocabulary = learn_vocabulary(captions, VOCABULARY_SIZE)
    jobs = {
        logs / "vit_and_coca": partial(train_vit_and_coca, out, vocabulary),
        logs / "conv": partial(train_clip, "teacher_conv", out, vocabulary),
    }
    side_by_side(jobs, "models", at_once=2)


def license_text(copyright_file: Path) -> str:
    """A Debian copyright file; of one with several licences, the stanza of the SIL OFL and who holds the rights."""
    text = copyright_file.read_text("utf-8")
    start = text.find("License:   SIL-1.1\n This")
    if start < 0:
        return text
    holders = text[text.index("Copyright:", text.index("fonts/*\n")) : text.index("License:   SIL-1.1")]
    return holders + "\n" + re.sub(r"(?m)^ \.?", "", text[start:].partition("\n")[2])


if __name__ == "__main__":
    main()
