"""LoRA files on their way from storage through the host to the worker's device, what is kept of them, and what the
weights of a step hold.

A file stays while a sample needs it, whatever the caches do; files are loaded in the order in which they are asked
for, each by the loader that is free first; a cached file is not read again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from real_runner.account import SERVICE_LOST, one_line
from real_runner.adapters.ledger import Clock, Instant, Ledger
from real_runner.adapters.peer import GuidancePeer, lora_in
from synerdiff.config.cluster import MIB, LoraStorage
from synerdiff.core import InputError, LoraUse, SampleId
from synerdiff.device.link import Link, LinkLost, Op
from synerdiff.diffusion.lora import LoraFile, read_lora
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.engine.adapters import Cache


class SourceLost(RuntimeError):
    """A source of files does not answer any more; what was asked of it can be asked of another."""


class FileSource(Protocol):
    """Where files come from; ``read`` is called by one thread at a time.

    It raises InputError for a file that cannot be had and SourceLost when it can never serve again.
    """

    def read(self, file: str) -> LoraFile:
        """The LoRA file of that name."""


class OwnReader:
    """Reads in the calling thread, from the allowed folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, file: str) -> LoraFile:
        """InputError names what is wrong with the file."""
        return replace(read_lora(f"{file}.safetensors", self._folder), name=file)


class RemoteReader:
    """A loader process, which reads from the allowed folder."""

    def __init__(self, link: Link, timeout_s: float) -> None:
        self._link, self._timeout_s = link, timeout_s

    def read(self, file: str) -> LoraFile:
        """SourceLost when the process that reads is gone."""
        try:
            answer = self._link.ask(Op.READ, {"file": file}, timeout_s=self._timeout_s)
        except LinkLost as error:
            raise SourceLost(str(error)) from None
        if answer.op is not Op.DONE:
            raise InputError(str(answer.fields["reason"]))
        return lora_in(answer)


@dataclass(slots=True)
class Loading:
    """One file that some samples need."""

    sample: SampleId
    users: int = 0
    started: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    lora: LoraFile | None = None
    failure: str = ""


class LoraStore:
    """The worker's files. ``background``: one thread per source loads what is asked for; else the thread that needs
    a file loads it (`load_now`)."""

    def __init__(
        self,
        storage: LoraStorage,
        sources: Sequence[FileSource],
        device: torch.device,
        gpu: int,
        clock: Clock,
        ledger: Ledger,
        background: bool,
    ) -> None:
        self.ledger = ledger
        self.reads = 0
        """Files read from storage, and files brought to the device, since the store was made."""
        self.copies = 0
        self._device, self._gpu, self._clock = device, gpu, clock
        self._host = Cache(round(storage.host_cache_mib * MIB), storage.cache)
        self._on_device = Cache(round(storage.device_cache_mib * MIB), storage.cache)
        self._host_files: dict[str, LoraFile] = {}
        self._device_files: dict[str, LoraFile] = {}
        self._needed: dict[str, Loading] = {}
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[str, Loading] | None] = queue.SimpleQueue()
        self._sources = list(sources)
        self._alive = len(self._sources)
        self._threads: list[threading.Thread] = []
        if background:
            names = ["loader"] if len(sources) == 1 else [f"loader{number}" for number in range(len(sources))]
            for name, source in zip(names, sources, strict=True):
                thread = threading.Thread(target=self._run, args=(name, source), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def need(self, files: Sequence[str], sample: SampleId) -> None:
        """A sample needs these from now on."""
        with self._lock:
            for file in files:
                self._needed.setdefault(file, Loading(sample)).users += 1

    def release(self, files: Sequence[str]) -> None:
        """A sample needs these no more."""
        with self._lock:
            for file in files:
                self._needed[file].users -= 1
                if not self._needed[file].users:
                    del self._needed[file]

    def ready(self, file: str) -> bool:
        """Whether loading a needed file has ended, well or not."""
        with self._lock:
            return self._needed[file].ended.is_set()

    def fetch(self, file: str) -> Loading:
        """Start to load a needed file, unless that has been done."""
        loading = self._start(file)
        if loading is not None:
            self._queue.put((file, loading))
            if not self._alive:
                self._fail_all()
        return self._needed[file]

    def load_now(self, file: str) -> Loading:
        """Load a needed file in this thread, unless that has been done."""
        loading = self._start(file)
        if loading is not None:
            self._load("loader", self._sources[0], file, loading)
        return self._needed[file]

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(1.0)

    def _start(self, file: str) -> Loading | None:
        """The loading that has to be begun now; None when it has begun, or the file is on the device."""
        with self._lock:
            loading = self._needed[file]
            if loading.started:
                return None
            loading.started = True
            if self._on_device.use(file):
                loading.lora = self._device_files[file]
                loading.ended.set()
                return None
            return loading

    def _run(self, lane: str, source: FileSource) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(1)
        while (job := self._queue.get()) is not None:
            try:
                self._load(lane, source, *job)
            except SourceLost as error:
                self._alive -= 1
                self.ledger.fault(SERVICE_LOST, (), one_line(error))
                self._queue.put(job)
                if not self._alive:
                    self._fail_all()
                return

    def _fail_all(self) -> None:
        """No source is left: what is asked for fails."""
        with suppress(queue.Empty):
            while True:
                if (job := self._queue.get_nowait()) is not None:
                    job[1].failure = f"its LoRA {job[0]}.safetensors cannot be loaded: no LoRA loader is left"
                    job[1].ended.set()

    def _load(self, lane: str, source: FileSource, file: str, loading: Loading) -> None:
        """Read unless the host has it, copy to the device, and tell who waits."""
        clock = self._clock
        start = clock.now()
        try:
            with self._lock:
                lora = self._host_files.get(file)
                if lora is not None:
                    self._host.use(file)
            if lora is None:
                lora = source.read(file)
                self.reads += 1
                if self._device.type == "cuda":
                    lora = lora.pinned()
            copied = lora.to(self._device)
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        except SourceLost:
            raise
        except Exception as error:  # whatever it is, it concerns the samples that need this file
            text = one_line(error)
            loading.failure = text if file in text else f"its LoRA {file}.safetensors cannot be loaded: {text}"
            loading.ended.set()
            return
        with self._lock:
            self.copies += 1
            _keep(self._host, self._host_files, file, lora)
            _keep(self._on_device, self._device_files, file, copied)
        self.ledger.add(self._gpu, lane, "load", start, clock.now(), samples=(loading.sample,))
        loading.lora = copied
        loading.ended.set()


def _keep(cache: Cache, files: dict[str, LoraFile], file: str, lora: LoraFile) -> None:
    """Put a file into a cache if it fits, and drop what the cache has given up."""
    if file not in cache:
        cache.put(file, lora.size_bytes)
    if file in cache:
        files[file] = lora
    for name in [name for name in files if name not in cache]:
        del files[name]


class Weights:
    """Only the denoise lane calls it, between two forwards."""

    def __init__(
        self, merged: MergedWeights, gpu: int, clock: Clock, ledger: Ledger, second: GuidancePeer | None
    ) -> None:
        self.ledger = ledger
        self._merged, self._gpu, self._clock, self._second = merged, gpu, clock, second

    @property
    def held(self) -> list[LoraUse]:
        """The LoRAs that are merged, in that order."""
        return [LoraUse(file, scale) for file, scale in self._merged.held.items()]

    def merge(self, lora: LoraFile, scale: float, samples: tuple[SampleId, ...]) -> None:
        """Raises InputError, before any change, for a file that does not fit the model."""
        self._merged.check(lora)
        start = self._clock.now()
        if self._second is not None:
            self._second.merge(lora, scale, samples)
        self._merged.merge(lora, scale)
        self._ended("merge", start, samples)

    def restore(self, leaving: Collection[LoraUse], samples: tuple[SampleId, ...] = ()) -> None:
        """Take these out of the weights."""
        keep = [lora.file for lora in self.held if lora not in leaving]
        start = self._clock.now()
        if self._second is not None:
            self._second.restore(keep, samples)
        self._merged.restore(keep)
        self._ended("restore", start, samples)

    def _ended(self, kind: str, start: Instant, samples: tuple[SampleId, ...]) -> None:
        self.ledger.add(self._gpu, "denoise", kind, start, self._clock.now(), samples=samples)
        if self._second is not None:
            self._second.followed()
