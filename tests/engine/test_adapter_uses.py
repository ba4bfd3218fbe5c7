"""How traces name LoRAs and ControlNets, and what the simulator makes of scales and images."""

from __future__ import annotations

from pathlib import Path

import pytest

from synerdiff.core import InputError, Request, controlnets_from, loras_from
from tests.swift_builders import cluster, serve, spans
from traces.native import read_trace


@pytest.mark.parametrize(
    ("text", "expected", "again"),
    [
        ("style", ("style", 1.0), "style"),
        ("style@1", ("style", 1.0), "style"),
        ("style@0.750", ("style", 0.75), "style@0.75"),
        ("a.b@-2", ("a.b", -2.0), "a.b@-2"),
        ("x@0.1234567890123", ("x", 0.1234567890123), "x@0.1234567890123"),
    ],
)
def test_a_lora_is_a_file_at_a_scale(text: str, expected: tuple[str, float], again: str) -> None:
    (use,) = loras_from([text])
    assert (use, str(use)) == (expected, again)


@pytest.mark.parametrize(
    ("text", "expected", "again"),
    [
        ("outline", ("outline", 1.0, ""), "outline"),
        ("outline@0.5", ("outline", 0.5, ""), "outline@0.5"),
        ("outline@1=seven.png", ("outline", 1.0, "seven.png"), "outline=seven.png"),
        ("outline@0.5=a@b.png", ("outline", 0.5, "a@b.png"), "outline@0.5=a@b.png"),
    ],
)
def test_a_controlnet_has_a_scale_and_an_image(text: str, expected: tuple[str, float, str], again: str) -> None:
    (use,) = controlnets_from([text])
    assert (use, str(use)) == (expected, again)


@pytest.mark.parametrize(
    ("column", "text", "words"),
    [
        ("loras", "style@much", "the LoRA 'style@much'; after the @ a number is needed"),
        ("loras", "style@nan", "the LoRA 'style@nan'; after the @ a number is needed"),
        ("loras", "a;@2", "the LoRA '@2', which has no name"),
        ("loras", "a;b@0.5;a@2", "the LoRA 'a' twice"),
        ("controlnets", "@1=x.png", "the ControlNet '@1=x.png', which has no name"),
        ("controlnets", "a@1=x.png;a=y.png", "the ControlNet 'a' twice"),
    ],
)
def test_names_that_cannot_be_are_refused_with_their_line(tmp_path: Path, column: str, text: str, words: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"arrival_s,steps,{column}\n0,1,\n1,1,{text}\n")
    with pytest.raises(InputError) as error:
        read_trace(path)
    assert str(error.value) == f"{path}, line 3: a request asks for {words}."


def test_scale_and_image_change_no_time() -> None:
    plain = [
        Request(0, 0, 2, guidance_scale=4.0, controlnets=controlnets_from(("canny",))),
        Request(1, 0, 2, controlnets=controlnets_from(("canny",))),
    ]
    named = [
        Request(0, 0, 2, guidance_scale=4.0, controlnets=controlnets_from(("canny@0.5=a.png",))),
        Request(1, 0, 2, controlnets=controlnets_from(("canny=b.png",))),
    ]
    for described in (cluster(), cluster(services=[{"controlnets": ["canny"]}], controlnets="service")):
        batched = {"policy": lambda: __import__("policies.registry").registry.build_policy("dynamic", {"batch": 2})}
        first, second = (serve(requests, described, **batched) for requests in (plain, named))
        assert spans(first) == spans(second)
        assert any(kind == "controlnet" for _, _, kind, _, _ in spans(second))
        # Samples that use one ControlNet with different images share its forward.
        assert {w.rows for w in second.run.work if w.kind == "controlnet"} == {4}
