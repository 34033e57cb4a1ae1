"""The scraper on the page of a server that serves, and that breaks while it does."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from rlgov.clock import SystemClock
from rlgov.engine.telemetry.deltas import difference
from rlgov.engine.telemetry.scraper import Scraper

PATIENCE_S = 60.0


def complete(url: str, prompt_tokens: int, output_tokens: int) -> None:
    body = {
        "model": "fake/model",
        "prompt": [1] * prompt_tokens,
        "max_tokens": output_tokens,
        "ignore_eos": True,
    }
    request = urllib.request.Request(  # noqa: S310  # loopback
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310  # as above
        answer.read()


def scraper_of(server: Any) -> Scraper:
    return Scraper(f"{server.url}/metrics", SystemClock(), engine_id="e", interval_s=PATIENCE_S)


def test_what_was_served_in_between_is_the_difference(start_fake: Callable[..., Any]) -> None:
    server = start_fake("--fake-token-ms", "1")
    scraper = scraper_of(server)
    assert scraper.scrape(), scraper.latest().failure
    before = scraper.latest().sample
    for tokens in (5, 7):
        complete(server.url, prompt_tokens=20, output_tokens=tokens)
    assert scraper.scrape(), scraper.latest().failure
    after = scraper.latest().sample
    assert before is not None
    assert after is not None
    delta = difference(before, after)
    assert delta.reset == ""
    assert (delta.generated_tokens, delta.prompt_tokens, delta.finished, delta.failed) == (12, 40, 2, 0)
    assert delta.token_gaps == 10  # the first token of a request ends no gap
    assert {name: h.count for name, h in delta.histograms.items()} == {
        "ttft_s": 2,
        "tpot_s": 2,
        "e2e_s": 2,
        "queue_s": 2,
        "token_gap_s": 10,
    }
    assert delta.itl_mean_s is not None
    assert delta.itl_mean_s > 0


@pytest.mark.parametrize("fault", ["empty", "html", "truncated", "nan", "500"])
def test_a_page_that_breaks_is_noticed_and_its_return_too(start_fake: Callable[..., Any], fault: str) -> None:
    server = start_fake()
    scraper = scraper_of(server)
    assert scraper.scrape()
    server.fault(metrics=fault)
    assert not scraper.scrape()
    assert scraper.latest().failure
    server.fault(reset=True)
    assert scraper.scrape(), scraper.latest().failure


def test_an_engine_started_anew_at_the_same_address_is_another(start_fake: Callable[..., Any]) -> None:
    first = start_fake()
    scraper = scraper_of(first)
    assert scraper.scrape()
    before = scraper.latest().sample
    first.process.kill()
    first.process.wait()
    assert not scraper.scrape()
    start_fake("--port", str(first.port))
    assert scraper.scrape(), scraper.latest().failure
    after = scraper.latest().sample
    assert before is not None
    assert after is not None
    assert "restarted" in difference(before, after).reset
