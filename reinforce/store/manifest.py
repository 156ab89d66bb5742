"""What a store promises: how every byte of it was made.

The manifest is an attribute of the store's root group, written before the first column and never changed by a run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Self

from reinforce.config import Recipe, parse
from reinforce.data import augment
from reinforce.errors import ManifestMismatch, StoreError

FORMAT_VERSION = 1
_SOFTWARE = ("torch", "open_clip_torch", "pillow", "numpy", "zarr", "numcodecs")


@dataclass(frozen=True)
class Manifest:
    """`models`: how each teacher and captioner describes itself (weights digest, sizes, precision, `logit_scale`).
    `augment_fields`: name and unit of the P parameters of a view, for each view set.
    `software`: versions that wrote the manifest, and the GPU where there was one; recorded, not compared."""

    recipe: dict[str, Any]
    models: dict[str, dict[str, Any]]
    augment_fields: dict[str, list[dict[str, str]]]
    software: dict[str, str]
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, recipe: Recipe, models: dict[str, dict[str, Any]], card: dict[str, str] = {}) -> Self:
        """The manifest of a recipe whose models have been loaded, on that `card` (models/device.py)."""
        return cls(
            recipe.model_dump(mode="json"),
            models,
            {name: augment.fields(view_set) for name, view_set in recipe.view_sets.items()},
            {package: version(package) for package in _SOFTWARE} | card,
        )

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Self:
        """Raises StoreError if this version of the project cannot read it."""
        if not isinstance(tree, dict) or tree.get("format_version") != FORMAT_VERSION:
            found = tree.get("format_version") if isinstance(tree, dict) else None
            raise StoreError(f"{where}: format version {found}; this program reads version {FORMAT_VERSION}")
        return cls(**{k: v for k, v in tree.items() if k != "fingerprint"})

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"fingerprint": self.fingerprint}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides bytes."""
        promise = json.dumps([self.format_version, _unlabelled(self.recipe), self.models], sort_keys=True)
        return hashlib.sha256(promise.encode()).hexdigest()

    def parsed_recipe(self) -> Recipe:
        return parse(Recipe, self.recipe, "the recipe in the store's manifest")

    def check_recipe(self, recipe: Recipe, where: str) -> None:
        """Raises ManifestMismatch with the differences between this promise and what is asked now."""
        _compare({"recipe": self.recipe}, {"recipe": recipe.model_dump(mode="json")}, where)

    def check(self, asked: "Manifest", where: str) -> None:
        """The same, models included."""
        _compare(
            {"recipe": self.recipe, "models": self.models}, {"recipe": asked.recipe, "models": asked.models}, where
        )


def _unlabelled(recipe: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in recipe.items() if k != "name"}


def _compare(stored: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    old, new = (_flat(tree | {"recipe": _unlabelled(tree["recipe"])}) for tree in (stored, asked))
    lines = [
        f"  {key}: the store has {old.get(key, 'nothing')}, this run asks for {new.get(key, 'nothing')}"
        for key in [*old, *(k for k in new if k not in old)]
        if old.get(key) != new.get(key)
    ]
    if lines:
        raise ManifestMismatch(
            f"{where} was written with another recipe; nothing was changed.\n" + "\n".join(lines) + "\n"
            "Run with the recipe it was written with, or give another STORE."
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, node in tree.items() for k, v in _flat(node, f"{prefix}.{name}" if prefix else name).items()}
