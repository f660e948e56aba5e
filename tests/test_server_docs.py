"""The API's page in a browser: it renders under its own policy, and asks nothing of anybody else."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

import pytest
from browser import CHROMIUM, Watched, chromium
from fastapi.testclient import TestClient
from playwright.sync_api import expect
from pydantic import SecretStr
from scripted_client import ScriptedClient
from served_app import served

from lightvllm.server import docs
from lightvllm.server.app import create_app
from lightvllm.server.settings import ServerSettings

SOON = 20_000  # milliseconds


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_page_renders_and_loads_nothing_foreign() -> None:
    settings = ServerSettings(api_keys=(SecretStr("secret"),))
    with served(create_app(ScriptedClient(), settings)) as server, chromium() as browser:
        page = browser.new_page()
        watched = Watched(page)
        expect.set_options(timeout=SOON)
        page.goto(f"{server.url}/docs")
        expect(page.locator(".info .title")).to_contain_text("lightvllm")
        route = page.locator(".opblock", has=page.locator('[data-path="/v1/models"]'))
        expect(route).to_have_count(1)
        page.locator("button.authorize").first.click()
        page.locator('.auth-container input[type="text"], .auth-container input[type="password"]').first.fill("secret")
        page.locator(".auth-container button.authorize").click()
        page.locator(".auth-container button.btn-done").click()
        route.locator("button.opblock-summary-control").click()
        route.locator(".try-out__btn").click()
        route.locator(".execute").click()
        expect(route.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
        assert f"{server.url}/v1/models" in watched.requests
        assert all(url.startswith((f"{server.url}/", "data:")) for url in watched.requests), watched.requests
        assert not watched.wrong


def test_pages_have_strict_headers() -> None:
    with TestClient(create_app(ScriptedClient(), ServerSettings())) as client:
        for path in ("/docs", "/static/docs.js", "/static/swagger-ui-bundle.js", "/static/swagger-ui.css"):
            answer = client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; ")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http" not in client.get("/docs").text


def test_below_a_proxy_links_have_its_path() -> None:
    with TestClient(create_app(ScriptedClient(), ServerSettings(root_path="/llm"))) as client:
        assert 'src="/llm/static/docs.js"' in client.get("/llm/docs").text


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/static/swagger-ui-bundle.js"])
def test_there_are_none_without_docs(path: str) -> None:
    with TestClient(create_app(ScriptedClient(), ServerSettings(docs=False))) as client:
        assert client.get(path).status_code == 404


def test_redoc_would_be_foreign() -> None:
    with TestClient(create_app(ScriptedClient(), ServerSettings())) as client:
        assert client.get("/redoc").status_code == 404


def test_a_missing_bundle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[[str], object] = resources.files

    def files(name: str) -> object:
        if name == "fastapi_swagger":
            raise ModuleNotFoundError(name)
        return found(name)

    docs._file.cache_clear()
    monkeypatch.setattr(resources, "files", files)
    with TestClient(create_app(ScriptedClient(), ServerSettings())) as client:
        answer = client.get("/docs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "missing_extra")
    assert "pip install 'lightvllm[server]'" in answer.json()["error"]["message"]
