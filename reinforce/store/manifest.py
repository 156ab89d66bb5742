"""What a store promises: how every byte of it was made.

The manifest is an attribute of the store's root group, written before the first column and never changed by a run. A
store that grows by a teacher, say, gets a larger manifest beside it, which keeps all that the smaller one promised.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, Self

from reinforce.config import NAMED, Packing, Recipe, parse
from reinforce.data import augment
from reinforce.errors import ManifestMismatch, StoreError
from reinforce.store.columns import FORMAT_VERSION, Column, class_columns, columns

LATER = ("architecture", "preprocessing", "vocabulary")  # what format 1 did not say of a model
PATHS = ("model", "pretrained", "prompts")  # of a teacher or captioner in a recipe: where it lies, not what it is
# What recipes did not say before it could be asked for, and still do not where it is not asked for.
_AT_FIRST = {"texts": {}, "embeddings": "bf16", "caption_keys": ["caption", "captions"], "caption_lines": False}
_SOFTWARE = ("torch", "open_clip_torch", "pillow", "numpy", "zarr", "numcodecs")


@dataclass(frozen=True)
class Manifest:
    """`models`: how each teacher and captioner describes itself (weights digest, sizes, precision, `logit_scale`).
    `augment_fields`: name and unit of the P parameters of a view, for each view set.
    `software`: versions that wrote the manifest, and the GPU where there was one. `embedding_loss`: where embeddings
    were repacked, what that lost, by teacher. These two are recorded and not compared."""

    recipe: dict[str, Any]
    models: dict[str, dict[str, Any]]
    augment_fields: dict[str, list[dict[str, str]]]
    software: dict[str, str]
    format_version: int = FORMAT_VERSION
    embedding_loss: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, models: dict[str, dict[str, Any]], card: dict[str, str] = {}) -> Self:
        """The manifest of a recipe whose models have been loaded, on that `card` (models/device.py)."""
        return cls(
            _as_before(recipe.model_dump(mode="json")),
            models,
            {name: augment.fields(view_set) for name, view_set in recipe.view_sets.items()},
            {package: version(package) for package in _SOFTWARE} | card,
        )

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Self:
        """Raises StoreError if this version of the project cannot read it, or it is not as it was written."""
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if version not in range(1, FORMAT_VERSION + 1):
            raise StoreError(f"{where}: format version {version}; this program reads versions 1 to {FORMAT_VERSION}")
        try:
            manifest = cls(**{k: v for k, v in tree.items() if k != "fingerprint"})
            if manifest.fingerprint == tree["fingerprint"]:
                return manifest
        except (TypeError, KeyError, AttributeError):
            pass
        raise StoreError(f"{where}: the manifest in its zarr.json is not as it was written; restore that file")

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self) | {"fingerprint": self.fingerprint}
        if not self.embedding_loss:
            del tree["embedding_loss"]  # as manifests were written before there was any
        return tree

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides bytes."""
        promise = json.dumps([self.format_version, _unlabelled(self.recipe), self.models], sort_keys=True)
        return hashlib.sha256(promise.encode()).hexdigest()

    def columns(self) -> list[Column]:
        """Those of every shard's group, in the order in which they are committed."""
        return columns(self.parsed_recipe(), self.format_version)

    def class_columns(self) -> list[Column]:
        return class_columns(self.parsed_recipe())

    def promise(self, column: Column) -> str:
        """A hash of all that decides what is in a column, and of nothing else: a store that grows by a teacher keeps
        its promises about the others. (The tar, too, decides: `Store.commit` takes its identity.)"""
        recipe, models = self.recipe, self.models
        parts: list[Any] = [self.format_version, str(column), bool(recipe.get("num_original_captions", 1))]
        parts += [recipe[name] for name in ("caption_keys", "caption_lines") if name in recipe]
        if column.kind == "view":
            parts += [recipe["seed"], recipe["view_sets"][column.set]]
        elif column.kind == "class":
            parts += [recipe["class_sets"][column.set]]
        elif column.set in recipe["captioners"]:
            parts += [recipe["seed"], _settings(recipe["captioners"][column.set]), models["captioners"][column.set]]
        elif column.set in recipe.get("texts", {}):
            parts += [recipe["texts"][column.set]]
        elif column.kind == "text":
            parts += [recipe.get("num_original_captions", 1)]
        if column.teacher:
            parts += [models["teachers"][column.teacher]]
            parts += [recipe["embeddings"]] if "embeddings" in recipe else []
        if column.teacher or column.set in recipe["captioners"]:
            parts += [recipe.get(name) for name in ("batch_size", "cpu_threads", "weights")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def parsed_recipe(self) -> Recipe:
        return self._parsed

    @cached_property
    def _parsed(self) -> Recipe:
        return parse(Recipe, self.recipe, "the recipe in the store's manifest")

    def check_recipe(self, recipe: Recipe, where: str, extend: bool = False) -> None:
        """Raises ManifestMismatch with the differences between this promise and what is asked now. `extend`: what is
        asked may have more teachers, captioners, view sets and class sets."""
        asked = recipe.model_dump(mode="json")
        _compare({"recipe": self.recipe}, {"recipe": _common(asked, self.recipe) if extend else asked}, where)

    def same_paths(self, recipe: Recipe) -> bool:
        """Whether a recipe names its models as this one does. Where it does not, they may be the same all the same:
        that is known when they are loaded."""
        asked = recipe.model_dump(mode="json")
        return all(
            of.get(path) == self.recipe[kind][name].get(path)
            for kind in ("teachers", "captioners")
            for name, of in asked[kind].items()
            if name in self.recipe[kind]
            for path in PATHS
        )

    def extended(self, asked: Self, where: str) -> Self:
        """What is asked, with all that was promised before as it is. Raises ManifestMismatch where that cannot be."""
        common = replace(
            asked,
            recipe=_common(asked.recipe, self.recipe),
            models={kind: {k: v for k, v in of.items() if k in self.models[kind]} for kind, of in asked.models.items()},
        )
        self.check(common, where)
        models = {kind: of | self.models[kind] for kind, of in asked.models.items()}
        fields = asked.augment_fields | self.augment_fields
        parts = {part: asked.recipe.get(part, {}) | self.recipe.get(part, {}) for part in NAMED}
        recipe = _as_before(asked.recipe | parts)
        return replace(asked, recipe=recipe, models=models, augment_fields=fields, format_version=self.format_version)

    def repacked(self, embeddings: Packing, lost: dict[str, dict[str, float]]) -> Self:
        """The same, whose embeddings are stored in another way, and what that loses. As if a run had asked for it."""
        asked = self.recipe | {"embeddings": embeddings}
        recipe = {name: asked[name] for name in Recipe.model_fields if name in asked}
        return replace(self, recipe=_as_before(recipe), embedding_loss=lost)

    def check(self, asked: "Manifest", where: str) -> None:
        """The same, models included; format 1 said less of a model, and only what is said is compared."""
        models = {
            kind: {
                name: {k: v for k, v in says.items() if k not in LATER or k in self.models[kind].get(name, LATER)}
                for name, says in of_kind.items()
            }
            for kind, of_kind in asked.models.items()
        }
        _compare({"recipe": self.recipe, "models": self.models}, {"recipe": asked.recipe, "models": models}, where)


def _as_before(recipe: dict[str, Any]) -> dict[str, Any]:
    """Without what a recipe does not ask for, as manifests were written before it could be asked for."""
    teachers = {
        name: {k: v for k, v in of.items() if (k, v) != ("image_px", None)} for name, of in recipe["teachers"].items()
    }
    asked = recipe | {"teachers": teachers}
    return {name: node for name, node in asked.items() if name not in _AT_FIRST or node != _AT_FIRST[name]}


def _unlabelled(recipe: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in recipe.items() if k != "name"}


def _pathless(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe decides bytes. A model is its weights and settings, wherever it lies: `models` tells of them."""
    of_models = {
        kind: {name: _settings(of) for name, of in recipe[kind].items()} for kind in ("teachers", "captioners")
    }
    return _AT_FIRST | _unlabelled(recipe) | of_models


def _settings(model: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in model.items() if k not in PATHS}


def _common(asked: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """What is asked, without the teachers and sets whose names were not there before."""
    return asked | {
        part: {name: node for name, node in asked.get(part, {}).items() if name in stored.get(part, {})}
        for part in NAMED
    }


def _compare(stored: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    old, new = (_flat(tree | {"recipe": _pathless(tree["recipe"])}) for tree in (stored, asked))
    lines = [
        f"  {key}: the store has {old.get(key, 'nothing')}, this run asks for {new.get(key, 'nothing')}"
        for key in [*old, *(k for k in new if k not in old)]
        if old.get(key) != new.get(key)
    ]
    if lines:
        raise ManifestMismatch(
            f"{where} was written with another recipe; nothing was changed.",
            *lines,
            "Run with the recipe it was written with, or give another STORE. `clip-reinforce extend` adds teachers, "
            "captioners, view sets and class sets to a store.",
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, node in tree.items() for k, v in _flat(node, f"{prefix}.{name}" if prefix else name).items()}
