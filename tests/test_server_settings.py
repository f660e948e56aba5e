"""Settings are checked when they are made, and tell nobody the keys."""

import pytest
from pydantic import ValidationError

from lightvllm.server.settings import RateLimit, ServerSettings


@pytest.mark.parametrize(
    ("text", "count", "seconds"),
    [("60/minute", 60, 60), ("1/second", 1, 1), (" 5 / HOUR ", 5, 3600), ("7/day", 7, 86400)],
)
def test_rates(text, count, seconds):
    assert RateLimit.parse(text) == RateLimit(count=count, seconds=seconds)


@pytest.mark.parametrize("text", ["", "60", "0/minute", "-1/minute", "60/fortnight", "1.5/second", "60/minutes"])
def test_no_rates(text):
    with pytest.raises(ValueError, match="is no rate; write it like 60/minute"):
        RateLimit.parse(text)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"api_keys": ("",)}, "API key 1 of 1"),
        ({"api_keys": ("good", "a b")}, "API key 2 of 2"),
        ({"api_keys": ("schlüssel",)}, "printable ASCII"),
        ({"root_path": "api"}, "must begin with a slash"),
        ({"root_path": "/api/"}, "not end with one"),
        ({"allow_credentials": True, "allowed_origins": ("*",)}, "origins by name"),
        ({"request_timeout": float("inf")}, "finite"),
        ({"max_logprobs": 21}, "less than or equal to 20"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings(wrong, words):
    with pytest.raises(ValidationError, match=words):
        ServerSettings(**wrong)


def test_keys_are_shown_by_nothing():
    settings = ServerSettings(api_keys=("very-secret",))  # type: ignore[arg-type]
    assert "very-secret" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    with pytest.raises(ValidationError) as caught:
        ServerSettings(api_keys=("very secret",))  # type: ignore[arg-type]
    assert "API key 1" in str(caught.value)
