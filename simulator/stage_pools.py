"""Stages on GPUs of their own: text encoders before the workers, decoders after them (contract, rule 20).

What is handed to a pool is served in the order in which it is handed over, each by the GPU that can begin it first;
nothing overtakes, so the end of a piece is known when it is handed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

from simulator.adapters import link_of, transfer_ns
from simulator.pieces import Times
from synerdiff.config.cluster import Cluster, Stages
from synerdiff.core import InputError, Request, Sample, WorkRecord
from synerdiff.engine.rounds import NEVER
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.sizes import carried
from synerdiff.profile.tables import Profile


class Servers:
    """GPUs that each do one piece at a time."""

    def __init__(self, gpus: Sequence[int]) -> None:
        self.gpus = gpus
        self._free_ns = [0] * len(gpus)

    def take(self, ready_ns: int, work_ns: int, after_ns: int = 0) -> tuple[int, int, int]:
        """(GPU, start, end) of a piece that is ready then, on the GPU that can begin it first, ties to the lower
        number; for ``after_ns`` more that GPU begins nothing."""
        start_ns, index = min((max(ready_ns, free_ns), index) for index, free_ns in enumerate(self._free_ns))
        self._free_ns[index] = start_ns + work_ns + after_ns
        return self.gpus[index], start_ns, start_ns + work_ns


class StagePools:
    """The stages of a cluster that are apart from its workers, and the links between."""

    def __init__(
        self,
        stages: Stages,
        cluster: Cluster,
        profile: Profile,
        profiles: Mapping[str, Profile],
        adapters: Adapters | None,
        seed: int | None,
    ) -> None:
        encode_gpus, decode_gpus = cluster.stage_gpus
        self.records: list[WorkRecord] = []
        self.end_ns = 0
        self._latent_bytes, self._embedding_bytes = carried(
            profile, stages.model_dump(include={"latent_bytes", "embedding_bytes"})
        )
        self._size = profile.head.size
        if cluster.link.gb_per_s is None and adapters is None:
            raise InputError(
                f"stages apart need link.gb_per_s in the cluster file: profile '{profile.name}' has no adapters.csv, "
                "which would say how fast the link is."
            )
        self._bytes_per_s, self._latency_ns = link_of(cluster.link, adapters)
        self.encoders = Servers(encode_gpus) if stages.encode else None
        self.decoders = Servers(decode_gpus) if stages.decode else None
        self._encode_ns = stages.encode.served(profile, profiles).overhead_ns("text_encode") if stages.encode else 0
        self._encoded: list[tuple[int, int, Request]] = []
        """A heap: (end of encoding, number of the request, request)."""
        if stages.decode is not None:
            own = stages.decode.served(profile, profiles)
            self._times = Times(own, "whole", seed)
            self._host_ns, self._copy_ns = own.overhead_ns("sample_host"), own.overhead_ns("result_copy")

    # --- text encoders ----------------------------------------------------------------------------------------------

    @property
    def due_ns(self) -> int:
        """When the next prompt is encoded; NEVER while none is under way."""
        return self._encoded[0][0] if self._encoded else NEVER

    def encode(self, request: Request, samples: Sequence[Sample], now_ns: int) -> None:
        """A request has arrived."""
        assert self.encoders is not None
        gpu, start_ns, end_ns = self.encoders.take(now_ns, self._encode_ns)
        ids = tuple([sample.id for sample in samples])
        self.records.append(WorkRecord.other(gpu, "encode", "encode", start_ns, end_ns, ids))
        heappush(self._encoded, (end_ns, request.request_id, request))

    def encoded(self, now_ns: int) -> list[Request]:
        """What has been encoded by now, by its end, ties in trace order."""
        done = []
        while self.due_ns <= now_ns:
            done.append(heappop(self._encoded)[2])
        return done

    def embedding_ns(self, request: Request) -> int:
        """The way of a request's embeddings to its worker: two prompts where it is guided."""
        prompts = 2 if request.guidance_scale > 1 else 1
        return transfer_ns(prompts * self._embedding_bytes, self._bytes_per_s, self._latency_ns)

    # --- decoders ---------------------------------------------------------------------------------------------------

    def decode(self, sample: Sample, now_ns: int) -> None:
        """A sample is denoised: its latents go to the decoders, which end it."""
        assert self.decoders is not None
        ready_ns = now_ns + transfer_ns(self._latents_of(sample.request), self._bytes_per_s, self._latency_ns)
        work_ns = self._times.of(sample.request).chunk_ns(0)
        gpu, start_ns, end_ns = self.decoders.take(ready_ns, work_ns, self._host_ns)
        sample.decode_started_ns = start_ns
        sample.finished_ns = end_ns + self._host_ns + self._copy_ns
        self.end_ns = max(self.end_ns, end_ns)
        self.records.append(WorkRecord.decode_chunk(gpu, 0, start_ns, end_ns, sample.id))

    def _latents_of(self, request: Request) -> int:
        if request.size is None or self._size is None:
            return self._latent_bytes
        pixels = self._size[0] * self._size[1]
        return -(-self._latent_bytes * request.size[0] * request.size[1] // pixels)
