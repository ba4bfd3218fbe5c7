"""How traces name LoRAs and ControlNets, and what the simulator makes of scales and images."""

from __future__ import annotations

import pytest

from synerdiff.core import InputError, Request
from synerdiff.engine.adapter_names import controlnet_name, controlnet_use, lora_use, require_each_once
from tests.swift_builders import cluster, serve, spans


@pytest.mark.parametrize(
    ("entry", "expected"),
    [("style", ("style", 1.0)), ("style@0.75", ("style", 0.75)), ("a.b@-2", ("a.b", -2.0))],
)
def test_a_lora_is_a_file_at_a_scale(entry, expected):
    assert lora_use(entry) == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("outline", ("outline", 1.0, "")),
        ("outline@0.5", ("outline", 0.5, "")),
        ("outline=seven.png", ("outline", 1.0, "seven.png")),
        ("outline@0.5=a@b.png", ("outline", 0.5, "a@b.png")),
    ],
)
def test_a_controlnet_has_a_scale_and_an_image(entry, expected):
    assert controlnet_use(entry) == expected
    assert controlnet_name(entry) == expected[0]


def test_names_that_cannot_be_are_one_sentence():
    for parse, entry, words in (
        (lora_use, "style@much", "the LoRA 'style@much'; after the @ a number is needed"),
        (lora_use, "style@nan", "after the @ a number is needed"),
        (lora_use, "@2", "the LoRA '@2', which has no name"),
        (controlnet_use, "@1=x.png", "the ControlNet '@1=x.png', which has no name"),
    ):
        with pytest.raises(InputError) as found:
            parse(entry)
        assert words in str(found.value)


def test_a_file_or_a_controlnet_asked_for_twice_is_refused():
    require_each_once(Request(0, 0, 1, loras=("a", "b"), controlnets=("a", "b")))
    for more in ({"loras": ("a@1", "a@2")}, {"controlnets": ("a@1=x.png", "a=y.png")}):
        with pytest.raises(InputError, match=r"request 7 asks for a (LoRA|ControlNet) twice"):
            require_each_once(Request(7, 0, 1, **more))


def test_scale_and_image_change_no_time():
    plain = [Request(0, 0, 2, guidance_scale=4.0, controlnets=("canny",)), Request(1, 0, 2, controlnets=("canny",))]
    named = [
        Request(0, 0, 2, guidance_scale=4.0, controlnets=("canny@0.5=a.png",)),
        Request(1, 0, 2, controlnets=("canny=b.png",)),
    ]
    for described in (cluster(), cluster(services=[{"controlnets": ["canny"]}], controlnets="service")):
        batched = {"policy": lambda: __import__("policies.registry").registry.build_policy("dynamic", {"batch": 2})}
        first, second = (serve(requests, described, **batched) for requests in (plain, named))
        assert spans(first) == spans(second)
        assert any(kind == "controlnet" for _, _, kind, _, _ in spans(second))
        # Samples that use one ControlNet with different images share its forward.
        assert {w.rows for w in second.run.work if w.kind == "controlnet"} == {4}
