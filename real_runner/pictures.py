"""Finished images as PNG files that hold their parameters."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.core import InputError, Sample
from synerdiff.diffusion.model import SampleState
from synerdiff.files import atomic

if TYPE_CHECKING:
    import PIL.Image


class PictureFolder:
    """Writes ``REQUEST.IMAGE.png`` from a thread of its own, so that the run does not wait for the disk.

    ``shared`` are parameters that all images have. Use as a context manager: leaving waits for the last file and raises
    InputError when one could not be written.
    """

    def __init__(self, folder: Path, shared: Mapping[str, str]) -> None:
        self._folder, self._shared = folder, shared
        self._queue: queue.SimpleQueue[tuple[Path, PIL.Image.Image, dict[str, str]] | None] = queue.SimpleQueue()
        self._errors: list[InputError] = []
        self.written = 0
        self._thread = threading.Thread(target=self._write_all, name="pictures", daemon=True)
        self._thread.start()

    def put(self, sample: Sample, state: SampleState, image: PIL.Image.Image) -> None:
        """Queue one finished image; returns at once."""
        parameters = {
            **self._shared,
            "request": str(sample.request.request_id),
            "image": str(sample.image),
            "prompt": state.prompt,
            "seed": str(state.seed),
            "steps": str(sample.steps),
            "guidance_scale": f"{state.guidance_scale:g}",
            "modes": sample.modes,
        }
        for name, entries in (("loras", sample.request.loras), ("controlnets", sample.request.controlnets)):
            if entries:
                parameters[name] = ";".join(map(str, entries))
        if sample.request.negative_prompt:
            parameters["negative_prompt"] = sample.request.negative_prompt
        self._queue.put((self._folder / f"{sample.name}.png", image, parameters))

    def _write_all(self) -> None:
        while (job := self._queue.get()) is not None:
            path, image, parameters = job
            try:
                write_png(path, image, parameters)
                self.written += 1
            except InputError as error:  # the run goes on; leaving says so
                self._errors.append(error)

    def __enter__(self) -> PictureFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._errors and kind is None:
            raise InputError(f"{len(self._errors)} images were not written; the first: {self._errors[0]}")


def write_png(path: Path, image: PIL.Image.Image, parameters: Mapping[str, str]) -> None:
    """One PNG with a text entry per parameter, in one step."""
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for name, value in parameters.items():
        texts.add_itxt(name, value)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=texts)
