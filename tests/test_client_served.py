"""``lightvllm.client`` and LangChain against a served tiny model: what docs/client.md shows."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="the client extra is not installed")
pytest.importorskip("fastapi", reason="the server extra is not installed")

import httpx2
import tiny_llama
from pydantic import BaseModel, ConfigDict, Field
from served_model import ServedModel, serve
from waiting import LIMIT

from lightvllm.client import Client
from lightvllm.errors import AuthError, InvalidOutput, ServerError
from lightvllm.server.settings import ServerSettings

KEY = "sk-of-the-test"


class Size(Enum):
    small = "small"
    large = "large"


class City(BaseModel):
    size: Size
    rank: int = Field(ge=1, le=9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder: Path = tiny_llama.build(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)
    settings = ServerSettings(served_model_names=("tiny",), api_keys=(KEY,), log_requests=False)
    with serve(folder, settings) as served:
        yield served


@pytest.fixture
def client(model: ServedModel) -> Iterator[Client]:
    with Client(model.url, api_key=KEY) as made:
        yield made
    model.wait_idle()


def test_text(client: Client) -> None:
    answer = client.inference("Where is Paris?", system="Be brief.", max_tokens=8, temperature=0)
    assert answer
    assert asyncio.run(client.a_inference("Where is Paris?", system="Be brief.", max_tokens=8, temperature=0)) == answer


def test_a_batch_is_its_questions_one_by_one(client: Client) -> None:
    prompts = [f"City {number}?" for number in range(12)]
    answers = client.inference_batch(prompts, max_tokens=6, temperature=0)
    assert answers == [client.inference(prompt, max_tokens=6, temperature=0) for prompt in prompts]


def test_streams_are_the_batch_in_pieces(client: Client) -> None:
    prompts = [f"City {number}?" for number in range(5)]
    texts = [""] * 5
    pieces = 0
    for index, delta in client.streaming_batch(prompts, max_tokens=12, temperature=0.7, seed=5, ignore_eos=True):
        assert isinstance(delta, str)
        texts[index] += delta
        pieces += 1
    assert texts == client.inference_batch(prompts, max_tokens=12, temperature=0.7, seed=5, ignore_eos=True)
    assert pieces > 10


def test_instances(client: Client) -> None:
    cities = client.inference_batch(["Paris", "Rome"], structured_output=City, max_tokens=100, temperature=1, seed=1)
    assert all(isinstance(city, City) for city in cities)
    *pieces, (index, last) = list(client.streaming_batch(["Oslo"], structured_output=City, max_tokens=100, seed=1))
    assert index == 0
    assert last == City.model_validate_json("".join(piece for _, piece in pieces))  # type: ignore[misc]
    with pytest.raises(InvalidOutput, match="raise max_tokens"):
        client.inference("Paris", structured_output=City, max_tokens=3)


def test_errors(model: ServedModel, client: Client) -> None:
    with pytest.raises(ServerError, match="temperature") as caught:
        client.inference("x", temperature=-1)
    assert (caught.value.status, caught.value.param) == (400, "temperature")
    assert caught.value.request_id
    with pytest.raises(ServerError, match="max_token"):
        client.inference("x", max_token=5)
    with Client(model.url, model="other", api_key=KEY) as wrong, pytest.raises(ServerError, match="other") as caught:
        wrong.inference("x")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with Client(model.url, api_key="no") as wrong, pytest.raises(AuthError):
        wrong.inference("x")


def test_a_stream_that_is_closed_frees_its_blocks(model: ServedModel, client: Client) -> None:
    stream = client.streaming_batch(["a", "b", "c"], max_tokens=900, ignore_eos=True)
    next(stream)
    stream.close()
    model.wait_idle()


@pytest.fixture
def chat(model: ServedModel) -> Iterator[Any]:
    """With HTTP clients of our own, because LangChain never closes its."""
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    with httpx2.Client() as http, asyncio.Runner() as runner:
        asynchronous = httpx2.AsyncClient()
        made = langchain_openai.ChatOpenAI(
            base_url=f"{model.url}/v1",
            api_key=KEY,
            model="tiny",
            max_tokens=100,
            seed=1,
            http_client=http,
            http_async_client=asynchronous,
        )
        yield made, runner.run
        runner.run(asynchronous.aclose())


def test_langchain_chats_and_streams(chat: Any) -> None:
    model, run = chat
    messages = [("system", "Be brief."), ("user", "Where is Paris?")]
    said = model.invoke(messages)
    assert said.content
    assert said.usage_metadata["output_tokens"] > 0
    pieces = list(model.stream(messages))
    assert len(pieces) > 2
    assert "".join(piece.content for piece in pieces) == said.content
    assert [answer.content for answer in model.batch([messages, messages])] == [said.content] * 2
    assert run(model.ainvoke(messages)).content == said.content


def test_langchain_gets_instances(chat: Any) -> None:
    city = chat[0].with_structured_output(City, method="json_schema").invoke("A city, please.")
    assert isinstance(city, City)


def test_langchain_calls_tools(chat: Any) -> None:
    class Visit(City):
        model_config = ConfigDict(extra="forbid")  # a model of random weights would go on for ever

    answer = chat[0].bind_tools([Visit], tool_choice="Visit").invoke("Which city?")
    (call,) = answer.tool_calls
    assert call["name"] == "Visit"
    assert Visit.model_validate(call["args"])


@pytest.mark.parametrize("heading", ["Client", "LangChain"])
def test_what_the_page_shows_runs(model: ServedModel, monkeypatch: pytest.MonkeyPatch, heading: str) -> None:
    page = (Path(__file__).parents[1] / "docs/client.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks
    code = "\n".join(blocks)
    assert "http://127.0.0.1:8000/v1" in code
    code = code.replace("http://127.0.0.1:8000/v1", f"{model.url}/v1").replace('"smollm2-135m"', '"tiny"')
    if heading == "LangChain":
        pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    command = [sys.executable, "-c", code]
    env = {**os.environ, "LIGHTVLLM_API_KEY": KEY}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
