"""No spelling of a path leads to what steers the engine."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.engine.gateway.paths import Kind, decoded_path, kind_of, leads_to_control, origin_form

CONTROL = [
    "/rlgov/v1/cap", "/pause", "/resume", "/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache",
    "/reset_mm_cache", "/reset_encoder_cache", "/reset_anything", "/abort_requests", "/scale_elastic_ep",
    "/inference/v1/abort_requests", "/server_info", "/start_profile", "/update_weights", "/v1/runtime_config",
    "/fault_tolerance/apply",
]  # fmt: skip


@pytest.mark.parametrize("path", CONTROL)
def test_control_is_recognised(path: str) -> None:
    assert leads_to_control(path.encode())


@pytest.mark.parametrize(
    "target",
    [
        b"/%72lgov/v1/cap", b"//rlgov/v1/cap", b"/v1/../rlgov/v1/cap", b"/./rlgov", b"/%2572lgov",
        b"/RLGOV/v1/cap", b"/x/%2e%2e/rlgov", b"/v1%2f..%2frlgov", b"/v1\\..\\rlgov", b"/rlgov;x/v1",
        b"/rlgov%20/v1", b"/prefix/rlgov/v1", b"http://elsewhere/rlgov/v1/cap", b"/%25252572lgov",
        b"/rlgov?x", b"/rlgov#x", b"/%2F%2Frlgov",
    ],
)  # fmt: skip
def test_other_spellings_are_seen_through(target: bytes) -> None:
    path = decoded_path(target)
    assert path is None or leads_to_control(path)


def _spelling(draw: st.DrawFn, name: str) -> bytes:
    """The name, with any of its characters encoded up to twice, in either case, behind harmless segments."""
    out = ""
    for character in name:
        times = draw(st.integers(0, 2))
        piece = f"%{ord(character):02{draw(st.sampled_from('xX'))}}" if times else character
        out += quote(piece, safe="") if times == 2 else piece
    before = draw(st.lists(st.sampled_from(["v1", ".", "..", "", "%2e%2e", "a"]), max_size=3))
    after = draw(st.sampled_from(["", "/", "/v1/cap", "?q=1", "/../x"]))
    return "/".join(["", *before, out]).encode() + after.encode()


@given(st.composite(_spelling)("rlgov"))
def test_any_spelling_is_seen_through(target: bytes) -> None:
    path = decoded_path(target)
    assert path is None or leads_to_control(path)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/models",
        "/health",
        "/tokenize",
        "/v1/models/my%20model",
        "/docs",
        "/v1/load_lora_adapter",
    ],
)
def test_the_rest_goes_through(path: str) -> None:
    decoded = decoded_path(path.encode())
    assert decoded is not None
    assert not leads_to_control(decoded)


@pytest.mark.parametrize("target", [b"*", b"", b"x:1", b"/a%00b", b"/a%0d%0ab"])
def test_what_is_no_path_is_none(target: bytes) -> None:
    assert decoded_path(target) is None


def test_kinds() -> None:
    assert kind_of(b"POST", b"/v1/completions") is Kind.CHOICES
    assert kind_of(b"POST", b"/v1/chat/completions") is Kind.CHOICES
    assert kind_of(b"POST", b"/v1/responses") is Kind.RESPONSES
    assert kind_of(b"GET", b"/v1/completions") is Kind.PLAIN
    assert kind_of(b"POST", b"/v1/embeddings") is Kind.PLAIN
    assert kind_of(b"GET", b"/health") is Kind.PROBE


def test_a_target_of_any_form_becomes_a_path() -> None:
    assert origin_form(b"http://gw:1/v1/models?x=1") == b"/v1/models?x=1"
    assert origin_form(b"http://gw") == b"/"
    assert origin_form(b"/a?b") == b"/a?b"
