"""What the router reads of a request's body: the model's name, and what its prompt begins with.

The body is parsed once and only as far as needed; the bytes that came are the bytes that are passed on.
"""

from __future__ import annotations

import hashlib

import msgspec

from lightvllm.router.replies import ApiError

_NOTHING = msgspec.Raw()


class Body(msgspec.Struct):
    """The fields that the router looks at. Whether the others are right is the replica's to say."""

    model: str | None = None
    messages: msgspec.Raw = _NOTHING
    prompt: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = _NOTHING


_body = msgspec.json.Decoder(Body)
_messages = msgspec.json.Decoder(list[_Message])
_KEY_BYTES = 16


def parse(content: bytes) -> Body:
    """Raises ApiError (400) for what is no JSON object, and for a ``model`` that is no string."""
    try:
        return _body.decode(content)
    except msgspec.ValidationError as error:
        if "$.model" in str(error):
            raise ApiError(400, "'model' must be a string", param="model") from None
        raise ApiError(400, "the body must be a JSON object") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is no valid JSON: {error}", code="invalid_json") from None


def affinity_key(body: Body, most: int) -> bytes | None:
    """What requests have in common whose prompts begin alike, 16 bytes; None if there is no prompt or ``most`` is 0.

    Of a chat that is all up to the first message of the user, ``most`` bytes of each message: this stays the same
    while the conversation grows. Of a completion it is the first ``most`` bytes of the prompt.
    """
    if not most:
        return None
    if parts := _beginning(body):
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        for part in parts:
            digest.update(part[:most])
            digest.update(b"\0")  # which JSON does not hold
        return digest.digest()
    return None


def _beginning(body: Body) -> list[memoryview]:
    if raw := memoryview(body.messages):
        try:
            messages = _messages.decode(raw)
        except (msgspec.DecodeError, RecursionError):  # the replica will say what is wrong with them
            return [raw]
        users = (number for number, message in enumerate(messages, 1) if message.role == "user")
        return [memoryview(message.content) for message in messages[: next(users, len(messages))]]
    return [raw for raw in (memoryview(body.prompt), memoryview(body.input)) if raw]
