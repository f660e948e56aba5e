"""The status page in a browser: what an operator sees while a server starts, works, fails and comes back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Watched, chromium, needs_browser
from playwright.sync_api import Browser, Locator, expect
from scripted_client import ScriptedClient
from served_app import ServedApp, served

from lightvllm.server.app import attach_engine, create_app
from lightvllm.server.settings import ServerSettings

pytestmark = needs_browser

SOON = 20_000  # milliseconds that the page may take to show something


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(SOON)
    expect.set_options(timeout=SOON)
    yield Watched(page)
    page.close()


def work(server: ServedApp, client: ScriptedClient, **stats: Any) -> None:
    """A request is answered, and the engine's numbers move."""
    client.tokens = 8

    async def request() -> None:
        async for _ in server.app.state.engine.generate([1, 2, 3]):
            pass
        client.set(
            total_steps=client.stats.total_steps + 8,
            total_step_seconds=client.stats.total_step_seconds + 0.08,
            total_generation_tokens=client.stats.total_generation_tokens + 8,
            total_prompt_tokens=client.stats.total_prompt_tokens + 3,
            **stats,
        )

    server.call(request)


def rank(watched: Watched, number: int) -> Locator:
    return watched.page.locator(f'.rank[data-rank="{number}"]')


def chart(watched: Watched, title: str) -> Locator:
    return watched.page.locator(".chart", has=watched.page.get_by_role("heading", name=title, exact=True))


def test_live_ranks_and_figures(watched: Watched) -> None:
    client = ScriptedClient(tp=2, pp=2, model="some/model")
    with served(create_app(client, ServerSettings())) as server:
        page = watched.page
        page.goto(server.url)
        expect(page.locator("h1")).to_have_text("some/model")
        expect(page.locator("#phase")).to_have_text("ready")
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator(".rank")).to_have_count(4)
        expect(page.locator(".stage")).to_have_count(2)
        for number in range(4):
            expect(rank(watched, number)).to_contain_text(f"rank {number}")
            expect(rank(watched, number)).to_contain_text("ready")
            expect(rank(watched, number)).to_contain_text(f"cuda:{number} · node-{number % 2} · pid {100 + number}")
        expect(rank(watched, 0)).to_contain_text("768 MiB of weights")
        facts = page.locator("#facts")
        for told in ("k8s", "TP 2 × PP 2", "float32", "512"):
            expect(facts).to_contain_text(told)
        work(server, client, num_running=3, num_waiting=7, kv_cache_usage=0.25)
        expect(chart(watched, "Sequences")).to_contain_text("running 3")
        expect(chart(watched, "Sequences")).to_contain_text("waiting 7")
        expect(chart(watched, "KV cache in use")).to_contain_text("25 %")
        expect(page.locator("#totals")).to_contain_text("requests finished1")
        expect(page.locator("#errors")).to_have_text("None.")
        assert page.title() == "some/model"
        assert not watched.wrong
        assert all(url.startswith(server.url) for url in watched.requests), "nothing comes from elsewhere"


def test_charts_move_while_requests_run(watched: Watched) -> None:
    client = ScriptedClient()
    with served(create_app(client, ServerSettings())) as server:
        watched.page.goto(server.url)
        line = chart(watched, "Tokens per second").locator("path.first")
        expect(line).to_have_count(1)
        seen = set()
        for _ in range(3):
            before = line.get_attribute("d")
            work(server, client)
            expect(line).not_to_have_attribute("d", before or "")
            seen.add(line.get_attribute("d"))
        assert len(seen) == 3
        expect(chart(watched, "Tokens per second").locator(".series").first).not_to_have_text("generated 0")
        expect(chart(watched, "Time per output token").locator("b")).to_have_text("63 ms")
        expect(chart(watched, "One step").locator("b").first).to_have_text("10 ms")
        label = chart(watched, "Sequences").locator("svg").get_attribute("aria-label")
        assert label == "Sequences: running 0, waiting 0"
        assert not watched.wrong


def test_a_dead_worker(watched: Watched) -> None:
    client = ScriptedClient(tp=2)
    with served(create_app(client, ServerSettings())) as server:
        page = watched.page
        page.goto(server.url)
        expect(rank(watched, 1)).to_have_attribute("data-health", "ready")
        server.call(lambda: client.kill(1, "killed by SIGKILL (out of memory?)"))
        expect(rank(watched, 1)).to_have_attribute("data-health", "dead")
        expect(rank(watched, 1)).to_contain_text("killed by SIGKILL (out of memory?)")
        expect(rank(watched, 0)).to_contain_text("stopped")
        expect(page.locator("#topology-note")).to_contain_text("0 of 2 ready")
        expect(page.locator("#banner")).to_have_text(
            "The engine has failed: worker worker-1 (rank 1) died: killed by SIGKILL (out of memory?)"
        )
        expect(page.locator("#phase")).to_have_text("failed")
        expect(page.locator("#errors")).to_contain_text("worker worker-1 (rank 1) died")
        assert page.title() == "failed: tiny"
        assert not watched.wrong


def test_what_the_server_says_is_text_never_markup(watched: Watched) -> None:
    evil = "<img src=x onerror=alert(1)>"
    client = ScriptedClient(tp=1, model=evil)
    with served(create_app(client, ServerSettings())) as server:
        watched.page.goto(server.url)
        expect(watched.page.locator("h1")).to_have_text(evil)
        server.call(lambda: client.kill(0, evil))
        expect(rank(watched, 0)).to_contain_text(evil)
        expect(watched.page.locator("#banner")).to_contain_text(evil)
        assert watched.page.locator("img").count() == 0
        assert not watched.wrong


def test_start_up(watched: Watched) -> None:
    app = create_app(None, ServerSettings(served_model_names=("some-name",)))
    app.state.lifecycle.progress = "loading weights: 1 of 2 ranks done"
    with served(app) as server:
        page = watched.page
        page.goto(server.url)
        expect(page.locator("h1")).to_have_text("some-name")
        expect(page.locator("#progress")).to_have_text("The model is being loaded: loading weights: 1 of 2 ranks done")
        expect(page.locator("#live")).to_be_hidden()
        app.state.lifecycle.progress = "capturing"
        expect(page.locator("#progress")).to_contain_text("capturing")
        server.call(lambda: attach_engine(app, ScriptedClient()))
        expect(page.locator("#starting")).to_be_hidden()
        expect(page.locator("#phase")).to_have_text("ready")
        expect(page.locator(".rank")).to_have_count(1)
        server.call(app.state.lifecycle.stop)
        expect(page.locator("#banner")).to_have_text("The server is shutting down")
        assert not watched.wrong


def test_the_connection_is_lost_and_comes_back(watched: Watched) -> None:
    client = ScriptedClient()
    server = ServedApp(create_app(client, ServerSettings()))
    try:
        page = watched.page
        page.goto(server.url)
        expect(page.locator("#phase")).to_have_text("ready")
        assert not watched.wrong
        server.stop()
        expect(page.locator("#phase")).to_have_text("no connection")
        expect(page.locator("#banner")).to_have_text("No connection to the server. Trying again …")
        expect(page.locator("main")).to_have_class("stale")
        server.start()
        expect(page.locator("#phase")).to_have_text("ready")
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("main")).not_to_have_class("stale")
        assert all("Failed to load resource" in wrong for wrong in watched.wrong), "only the browser's own words"
    finally:
        server.stop()


def test_an_api_key_is_asked_for_and_kept_for_the_tab(watched: Watched) -> None:
    app = create_app(ScriptedClient(), ServerSettings(api_keys=("right-key",)))  # type: ignore[arg-type]
    with served(app) as server:
        page = watched.page
        page.goto(server.url)
        field = page.get_by_label("This server needs an API key.")
        expect(field).to_be_focused()
        expect(page.locator("main")).to_be_hidden()
        field.fill("wrong-key")
        page.keyboard.press("Enter")
        expect(page.locator("#key-wrong")).to_be_visible()
        field.fill("right-key")
        page.get_by_role("button", name="Show status").click()
        expect(page.locator("#phase")).to_have_text("ready")
        expect(page.locator("#key-form")).to_be_hidden()
        page.reload()
        expect(page.locator("#phase")).to_have_text("ready")
        assert page.evaluate("Object.keys(localStorage).length") == 0
        assert page.evaluate("document.cookie") == ""
        assert not any("key" in url for url in watched.requests), "never in an address"
        assert all("401" in wrong for wrong in watched.wrong)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_runs_over_at_any_width(browser: Browser, width: int, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": width, "height": 700}, color_scheme=scheme)
    client = ScriptedClient(tp=2, model="a-very-long-model-name-" * 4)
    try:
        with served(create_app(client, ServerSettings())) as server:
            page.goto(server.url)
            expect(page.locator(".rank")).to_have_count(2, timeout=SOON)
            work(server, client)
            server.call(lambda: client.kill(1, "no-space-" * 40))
            expect(page.locator("#phase")).to_have_text("failed", timeout=SOON)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            background, color = (
                page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
            )
            dark, bright = (sum(map(int, re.findall(r"\d+", each)[:3])) for each in (background, color))
            assert (dark < bright) == (scheme == "dark")
    finally:
        page.close()


def test_below_a_proxys_path(watched: Watched) -> None:
    app = create_app(ScriptedClient(), ServerSettings(root_path="/llm"))
    with served(app) as server:
        watched.page.goto(f"{server.url}/llm")
        expect(watched.page.locator("#phase")).to_have_text("ready")
        assert not watched.wrong


def test_pages_that_are_closed_are_forgotten(watched: Watched) -> None:
    app = create_app(ScriptedClient(), ServerSettings())
    with served(app) as server:
        watched.page.goto(server.url)
        expect(watched.page.locator("#phase")).to_have_text("ready")
        assert app.state.status_listeners == 1
        watched.page.goto("about:blank")

        async def forgotten() -> None:
            async with asyncio.timeout(SOON / 1000):
                while app.state.status_listeners:
                    await asyncio.sleep(0.05)

        server.call(forgotten)
