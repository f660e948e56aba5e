"""The error object that server and router answer with."""

from __future__ import annotations

import json

import pytest

from lightvllm.openai_errors import OpenAIError


def test_the_object_and_its_headers():
    error = OpenAIError(429, "come later", param="n", code="busy", retry_after=0.2, headers={"X": "y"})
    told = {"message": "come later", "type": "rate_limit_error", "param": "n", "code": "busy"}
    assert error.body() == {"error": told}
    assert json.loads(error.content()) == {"error": told}
    assert error.headers == {"X": "y", "Retry-After": "1"}, "rounded up"
    assert str(error) == "come later"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (500, "server_error"),
        (502, "server_error"),
        (503, "service_unavailable_error"),
    ],
)
def test_the_kind_follows_from_the_status(status, kind):
    assert OpenAIError(status, "").type == kind
    assert OpenAIError(status, "", type="other").type == "other"


def test_what_has_no_utf_8_or_breaks_a_line_can_be_sent():
    error = OpenAIError(400, "a\ud800\nb", param="\udfff")
    assert error.body()["error"]["message"] == "a\\ud800\nb"
    assert error.body()["error"]["param"] == "\\udfff"
    assert b"\n" not in error.content(), "it is one line of an event"
