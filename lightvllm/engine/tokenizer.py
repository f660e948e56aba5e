"""A Hugging Face folder's tokenizer: text to tokens, tokens to text, messages to a prompt.

Uses ``tokenizers`` and ``jinja2``, imported when a tokenizer is made; transformers is not needed. Special tokens are
added where the post-processor of ``tokenizer.json`` adds them, and nowhere else; a chat template writes its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightvllm.errors import ConfigError

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer as FastTokenizer

Message = Mapping[str, Any]
"""``{"role": "user", "content": "…"}``, and whatever else the model's chat template knows."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Made by ``Tokenizer.from_dir``.

    Attributes:
        vocab_size: number of tokens, added ones included.
        special_tokens: ``bos_token``, ``eos_token``, … as far as the folder names them.
        token_ids: all there are; a model's padded vocabulary may have more, which have no text.
        special_token_ids: what ``skip_special_tokens`` leaves out.
        byte_token_ids: ``<0x00>`` to ``<0xFF>`` of a byte-fallback vocabulary, otherwise empty.
        chat_template: the Jinja source, or None.
    """

    def __init__(self, fast: FastTokenizer, special_tokens: Mapping[str, str], chat_template: str | None) -> None:
        self._fast = fast
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.vocab_size = fast.get_vocab_size(with_added_tokens=True)
        added = fast.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        vocab = fast.get_vocab(with_added_tokens=True)
        self.token_ids = frozenset(vocab.values())
        self.byte_token_ids = frozenset(i for token, i in vocab.items() if _BYTE_TOKEN.fullmatch(token))

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``; the last two may be missing.

        Raises ConfigError when a file cannot be used.
        """
        from tokenizers import Tokenizer as FastTokenizer

        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"{folder}: no tokenizer.json; save the model's fast tokenizer there "
                "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
            )
        try:
            fast = FastTokenizer.from_file(str(file))
        except Exception as broken:  # noqa: BLE001  tokenizers raises bare Exceptions
            raise ConfigError(f"{file}: not a tokenizer: {_first_line(broken)}") from None
        fast.no_truncation()
        fast.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        special = {**_read_json(folder / "special_tokens_map.json"), **config}
        tokens = {name: _content(special[name]) for name in _SPECIAL if special.get(name) is not None}
        return cls(fast, tokens, _chat_template(folder, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with whatever the post-processor adds (often a beginning-of-sequence token)."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        text: str = self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt that the model was trained to see for these messages; encode it without special tokens.

        Rendered in a sandbox as transformers does. Raises ConfigError when there is no template, when a message is
        not a mapping with a ``role``, and when the template refuses the messages.
        """
        import jinja2

        if not messages:
            raise ConfigError("a conversation needs at least one message; got none")
        message: Any  # whatever a caller passed
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ConfigError(
                    f'message {number} is {message!r}; expected a mapping such as {{"role": "user", "content": "…"}}'
                )
            if not ("content" in message or "tool_calls" in message):
                raise ConfigError(f"message {number} has no content; expected {{'role': …, 'content': …}}")
        template = self._template
        try:
            return template.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as refused:
            raise ConfigError(f"the model's chat template refuses these messages: {_first_line(refused)}") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        """Compiled with transformers' environment (``utils/chat_template_utils.py``)."""
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(jinja2.ext.Extension):
            """``{% generation %}`` marks what the assistant says; for a prompt it is only its content."""

            tags = {"generation"}  # noqa: RUF012  jinja2's own way

            def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.Scope(body).set_lineno(line)

        def raise_exception(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        def tojson(
            value: Any,
            ensure_ascii: bool = False,
            indent: int | None = None,
            separators: tuple[str, str] | None = None,
            sort_keys: bool = False,
        ) -> str:
            return json.dumps(
                value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )

        def strftime_now(format: str) -> str:
            return datetime.now().strftime(format)

        if self.chat_template is None:
            raise ConfigError(
                "this model has no chat template (neither chat_template.jinja nor chat_template in "
                "tokenizer_config.json); give plain prompts instead of messages"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        try:
            return environment.from_string(self.chat_template)
        except jinja2.TemplateError as broken:
            raise ConfigError(f"the model's chat template is broken: {_first_line(broken)}") from None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The file wins over the configuration, as in transformers; of several named templates the default one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"{file}: not valid JSON: {broken}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _content(token: Any) -> str:
    """A special token is written as a string, or as a serialised AddedToken."""
    return str(token["content"] if isinstance(token, dict) else token)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
