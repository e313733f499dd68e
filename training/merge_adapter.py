"""The adapter to merge: a PEFT folder, or a revision of the store. Validated as for serving."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapters.catalog import Revision
from adapters.folder import CONFIG_FILE
from adapters.manifest import (
    AdapterConflict,
    AdapterManifest,
    AdapterNotFound,
    AdapterRefused,
    BaseShape,
    Limits,
    ModuleEntry,
    show,
)
from adapters.rope import scaling_of
from adapters.rows import Rows
from adapters.store import Store, object_path
from adapters.weights import object_digest, read_object

# A merge has no bank whose room it must fit; what is refused is what cannot be merged.
_ROOMY = {"max_rank": 1 << 16, "max_bank_rows": 1 << 20, "max_bytes": 1 << 36}


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA on one linear, fp32.

    lora_a     [rank, in]
    lora_b     [out, rank]
    magnitude  [out]; None without DoRA
    """

    rank: int
    scaling: float
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor | None

    def add_to(self, weight: torch.Tensor) -> None:
        """Change a weight [out, in] fp32 in place to what base and adapter come to together.

        W + scaling * B A; with DoRA each row of that is scaled to its magnitude, as PEFT merges.
        """
        weight.addmm_(self.lora_b, self.lora_a, alpha=self.scaling)
        if self.magnitude is not None:
            weight *= (self.magnitude / torch.linalg.norm(weight, dim=1)).unsqueeze(1)


class MergeAdapter:
    """A validated adapter whose tensors are read when they are asked for."""

    def __init__(
        self,
        path: Path,
        digest: str,
        manifest: AdapterManifest,
        revision: str | None,
        training: dict[str, Any],
    ) -> None:
        if scaling_of(manifest.rope) is not None:
            raise AdapterRefused("rope", "an adapter with RoPE scaling is served, never merged")
        self.digest, self.manifest, self.revision = digest, manifest, revision
        self.training = training  # how it was made, as its turnout.json says; may be empty
        self._path = path
        self._modules = {f"model.{entry.prefix}": entry for entry in manifest.modules}

    @property
    def module_names(self) -> list[str]:
        """The linears it changes, as the checkpoint spells them: `model.layers.0.mlp.up_proj`."""
        return list(self._modules)

    def lora(self, module: str, device: torch.device) -> Lora | None:
        """What it does to a linear; None where it leaves it alone."""
        entry = self._modules.get(module)
        if entry is None:
            return None
        with safe_open(self._path, framework="pt") as stored:

            def tensor(part: str) -> torch.Tensor:
                found: torch.Tensor = stored.get_tensor(f"{entry.prefix}.{part}")
                return found.to(device, torch.float32)

            return Lora(
                rank=entry.rank,
                scaling=entry.scaling,
                lora_a=tensor("lora_a"),
                lora_b=tensor("lora_b"),
                magnitude=tensor("magnitude") if entry.use_dora else None,
            )


@contextlib.contextmanager
def open_adapter(
    source: str, base: BaseShape, store: Path, scratch: Path, *, allow_other_base: bool
) -> Iterator[MergeAdapter]:
    """Open the adapter in folder `source`, or the one that the store at `store` calls so.

    A folder is staged in `scratch`. Raises AdapterError for what does not fit the base.
    """
    folder = Path(source)
    if not (folder / CONFIG_FILE).is_file():
        if folder.is_dir():
            raise AdapterNotFound(
                f"The adapter folder {source} holds no {CONFIG_FILE}. If the store's adapter of "
                f"that name is meant, say {folder.name}@REVISION."
            )
        yield _from_store(source, base, store, allow_other_base=allow_other_base)
        return
    with contextlib.closing(Store.open(scratch)) as staging:
        limits = Limits(**_ROOMY, allow_other_base=allow_other_base)
        staged = staging.stage(folder, base, limits, allow_mismatch=True)
        trained_on = staged.training.get("base_digest")
        if trained_on not in (None, base.digest) and not allow_other_base:
            raise AdapterRefused(
                "base_digest",
                f"{show(trained_on)} is what it was trained on; this base is {base.digest}",
            )
        yield MergeAdapter(staged.path, staged.digest, staged.manifest, None, staged.training)


def _from_store(
    model: str, base: BaseShape, store: Path, *, allow_other_base: bool
) -> MergeAdapter:
    """A revision of the store, also while a server holds it: rows and objects are only read."""
    revision = _find(model, store)
    if revision.base_digest != base.digest and not allow_other_base:
        raise AdapterConflict(
            f"The adapter {revision.id} was registered for base {revision.base_digest[:12]}; "
            f"this one is {base.digest[:12]}."
        )
    path = object_path(store, revision.digest)
    if not path.is_file():
        raise AdapterNotFound(f"The store has lost {revision.id}; push it again.")
    if object_digest(path) != revision.digest:
        raise ValueError(f"the stored object of {revision.id} is damaged; push it again")
    manifest, tensors = read_object(path)
    for entry in manifest.modules:
        shapes = tuple(tensors[f"{entry.prefix}.{part}"].shape for part in ("lora_a", "lora_b"))
        _check_fit(entry, shapes, base)
    training = revision.source.get("training") or {}
    return MergeAdapter(path, revision.digest, manifest, revision.id, training)


def _find(model: str, store: Path) -> Revision:
    """The revision that `name` or `name@number` means."""
    name, at, number = model.partition("@")
    database = store / "registry.sqlite"
    if not database.is_file():
        raise AdapterNotFound(
            f"{show(model)} is no folder with {CONFIG_FILE}, and there is no store at {store}."
        )
    with contextlib.closing(Rows(database)) as rows:
        published = dict(rows.publications())  # the last publication of a name is its current one
        wanted = number if at else str(published.get(name))
        for revision in rows.revisions():
            if (revision.name, str(revision.number)) == (name, wanted):
                return revision
    raise AdapterNotFound(
        f"{show(model)} is no folder with {CONFIG_FILE}, and the store at {store} has no published "
        "adapter or revision of this name."
    )


def _check_fit(entry: ModuleEntry, shapes: tuple[tuple[int, ...], ...], base: BaseShape) -> None:
    num_out, num_in = base.linears.get(entry.linear, (0, 0))
    wanted = ((entry.rank, num_in), (num_out, entry.rank))
    if entry.layer >= base.num_layers or shapes != wanted:
        raise AdapterRefused(f"tensor {entry.prefix}", "does not fit this base")
