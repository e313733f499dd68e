"""Safetensors in, safetensors out: one tensor in memory at a time, in any order.

A merged checkpoint has the base's shards, names, shapes and dtypes, so each output shard begins
with its base shard's header and every tensor has its place before the first one is worked out.
Files are read and written, never mapped: what was read does not stay resident.
"""

import json
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from adapters.header import Header, TensorInfo, read_header
from adapters.manifest import AdapterRefused
from server.base_digest import INDEX_FILE, shard_names

CHUNK_BYTES = 64 << 20  # of a tensor that is copied; a multiple of every dtype's size
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FOUR_BIT_REASON = (
    "an adapter's delta is far below half a step of a 4-bit grid, so rounding would erase it; "
    "merge into the 16-bit checkpoint and quantize the result"
)
_MAX_IO_BYTES = 1 << 30  # Linux moves less than 2 GiB in one call


class Checkpoint:
    """The tensors of a base's safetensors files, by name. ValueError where it is not mergeable."""

    def __init__(self, folder: Path) -> None:
        check_is_not_quantized(folder)
        self.folder = folder
        self.shards = {name: _read_header(folder / name) for name in shard_names(folder)}
        self._shard_of: dict[str, str] = {}
        for shard, header in self.shards.items():
            for name in header.tensors:
                if name in self._shard_of:
                    raise ValueError(f"{folder}: {name} is in {shard} and {self._shard_of[name]}")
                self._shard_of[name] = shard
        self._files = {name: _open(folder / name, os.O_RDONLY) for name in self.shards}

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(self.info(name).num_bytes for name in self)

    def shard(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._shard_of[name]

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor; ValueError if there is none of this name."""
        if name not in self._shard_of:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        return self.shards[self._shard_of[name]].tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype it is stored in."""
        info = self.info(name)
        return self._read(name, 0, info.num_bytes).view(info.shape)

    def tensors(self, names: Iterable[str]) -> Generator[tuple[str, torch.Tensor]]:
        """Read tensors one after the other, each while the one before it is being used."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead: tuple[str, Future[torch.Tensor]] | None = None
            for name in names:
                reading = pool.submit(self.tensor, name)
                if ahead is not None:
                    yield ahead[0], ahead[1].result()
                ahead = name, reading
            if ahead is not None:
                yield ahead[0], ahead[1].result()

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Read some rows of a matrix: [count, width], or fewer at its end."""
        height, width = self.info(name).shape
        row_bytes = self.info(name).num_bytes // height
        count = min(count, height - first)
        return self._read(name, first * row_bytes, count * row_bytes).view(count, width)

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's elements, flat, a bounded number at a time."""
        num_bytes = self.info(name).num_bytes
        for at in range(0, num_bytes, CHUNK_BYTES):
            yield self._read(name, at, min(CHUNK_BYTES, num_bytes - at))

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _read(self, name: str, at: int, num_bytes: int) -> torch.Tensor:
        info = self.info(name)
        found = torch.empty(num_bytes, dtype=torch.uint8)
        view, file = found.numpy().data, self._files[self._shard_of[name]]
        done = 0
        while done < num_bytes:
            piece = view[done : done + _MAX_IO_BYTES]
            read = os.preadv(file, [piece], info.start + at + done)
            if read == 0:
                raise ValueError(f"{self.folder}: the file of {name} was cut while it was read")
            done += read
        return found.view(DTYPES[info.dtype])


class Writer:
    """Writes a checkpoint of the base's layout into an empty folder, each tensor once.

    A thread writes one piece while the next one is made; no more are ever waiting.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self._base, self._missing = base, set(base)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        self._files = {name: _open(folder / name, os.O_RDWR | os.O_CREAT) for name in base.shards}
        for name, header in base.shards.items():
            tensors = header.tensors.values()
            start = min((tensor.start for tensor in tensors), default=0)
            end = max((tensor.start + tensor.num_bytes for tensor in tensors), default=0)
            with (base.folder / name).open("rb") as source:
                os.pwrite(self._files[name], source.read(start), 0)
            os.truncate(self._files[name], end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of the base's shape and dtype; ValueError if it holds NaN or Inf."""
        info = self._base.info(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, DTYPES[info.dtype]), name
        self._write(name, 0, tensor.contiguous().view(-1))
        self._missing.remove(name)

    def copy(self, name: str) -> None:
        """Take a tensor over from the base."""
        at = 0
        for chunk in self._base.chunks(name):
            self._write(name, at, chunk)
            at += chunk.nbytes
        self._missing.remove(name)

    def finish(self) -> None:
        """Wait for the last write; every tensor must have been written."""
        if self._writing is not None:
            self._writing.result()
        assert not self._missing, f"never written: {sorted(self._missing)}"

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown()
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _write(self, name: str, at: int, flat: torch.Tensor) -> None:
        if not _is_finite(flat):
            raise ValueError(
                f"{name} would hold NaN or Inf in {self._base.info(name).dtype}; nothing is written"
            )
        view = flat.cpu().view(torch.uint8).numpy().data
        file, start = self._files[self._base.shard(name)], self._base.info(name).start + at
        if self._writing is not None:
            self._writing.result()
        self._writing = self._pool.submit(_write_all, file, view, start)


def is_buffer(name: str) -> bool:
    """Whether old checkpoints alone hold it: it follows from the config; no quantizer keeps it."""
    return name.endswith("rotary_emb.inv_freq")


def check_is_not_quantized(folder: Path) -> None:
    """Refuse a checkpoint whose config says that its weights are packed."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "?") if isinstance(found, dict) else "?"
        raise ValueError(
            f"--base is {str(folder)!r}, quantized already ({method}): {FOUR_BIT_REASON}"
        )


def copy_side_files(base: Path, folder: Path, chat_template: str | None) -> None:
    """Copy config, tokenizer, chat template and licence; the adapter's own template wins."""
    for source in sorted(base.iterdir()):
        if source.is_file() and _is_side_file(source.name):
            shutil.copyfile(source, folder / source.name)
    if chat_template is None:
        return
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():  # two templates in one folder would contradict each other
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        config_file.write_text(text, encoding="utf-8")


def _is_side_file(name: str) -> bool:
    if name.startswith(("LICENSE", "NOTICE")):
        return True
    if name.endswith(".index.json"):
        return name == INDEX_FILE
    if name in ("turnout.json", "adapter_config.json"):  # these speak of the base's own making
        return False
    return name.endswith((".json", ".jinja", ".txt", ".model", ".tiktoken"))


def _read_header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            return read_header(file, path.name, max_bytes=1 << 48)
    except AdapterRefused as error:
        reason = f" ({FOUR_BIT_REASON})" if "has dtype" in error.message else ""
        raise ValueError(f"{path.parent}: {error.message}{reason}") from None


def _is_finite(flat: torch.Tensor) -> bool:
    """One pass over the values: a NaN anywhere makes both ends NaN."""
    return flat.numel() == 0 or bool(torch.stack(flat.aminmax()).isfinite().all())


def _write_all(file: int, view: memoryview, start: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done : done + _MAX_IO_BYTES], start + done)


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o644)
