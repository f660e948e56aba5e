"""A Hugging Face folder's tokenizer: text to tokens, tokens to text, messages to a prompt.

Uses ``tokenizers`` and ``jinja2``, imported when a tokenizer is made; transformers is not needed. Special tokens are
added where the post-processor of ``tokenizer.json`` adds them, and nowhere else; a chat template writes its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightvllm.errors import ConfigError

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer as FastTokenizer

Message = Mapping[str, Any]
"""``{"role": "user", "content": "…"}``, and whatever else the model's chat template knows."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_CONTINUE = "CONTINUE-FROM-HERE-7f3a "  # marks the end of a final message that is to be continued
_MAX_TEMPLATES = 8  # compiled ones that are kept
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
        longest_token: a token stands for at most so many characters; None where an unknown token stands for any number.
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
        # As the vocabulary writes them, which is no shorter than their text.
        self.longest_token = max(map(len, vocab)) if _spells_all(fast) else None
        self._added = {i: token.content for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

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
        """Token ids of ``text``; with whatever the post-processor adds (often a beginning-of-sequence token).

        Raises ConfigError for text that has no UTF-8: half of a surrogate pair.
        """
        try:
            ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # tokenizers says no more than that it is no text
            raise ConfigError("the text is no valid Unicode: it has half of a surrogate pair") from None
        return ids

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it ("Ġworld", "▁world"); None for an id that it does not have."""
        token: str | None = self._fast.id_to_token(token_id)
        return token

    def token_id(self, token: str) -> int | None:
        """The id of a token, written as the vocabulary writes it."""
        token_id: int | None = self._fast.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the bytes of a text, also where that is no whole character; b"" for an unknown id.

        A leading space that a decoder drops at the beginning of a text is in it.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._raw(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The text of one token, decoded alone, special tokens too; "" for an unknown id. Remembered."""
        known = self._texts.get(token_id)
        if known is None:
            known = self._texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return known

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        text: str = self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model was trained to see for these messages; encode it without special tokens.

        Rendered in a sandbox as transformers does.

        Args:
            messages: mappings with a ``role``, and ``content`` or ``tool_calls`` (whose ``arguments`` most templates
                expect as a mapping).
            add_generation_prompt: end where the assistant's answer begins.
            tools, documents: what templates call so; None for a template's own default.
            continue_final_message: end where the last message's content ends, so that the model continues it; not with
                ``add_generation_prompt``.
            chat_template: Jinja source in place of the model's own.
            template_kwargs: more names for the template (vLLM's ``chat_template_kwargs``).

        Raises ConfigError when there is no template, when a message is not a mapping with a ``role``, and when the
        template refuses the messages.
        """
        import jinja2

        given = _check_messages(messages)
        known: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
        }
        extra = dict(template_kwargs or {})
        if wrong := sorted(set(extra) & {*known, "messages", "self", *self.special_tokens}):
            raise ConfigError(f"chat_template_kwargs may not set {', '.join(wrong)}; that has a place of its own")
        if continue_final_message:
            if add_generation_prompt:
                raise ConfigError("continue_final_message and add_generation_prompt exclude each other; use one")
            final = given[-1].get("content")
            if not isinstance(final, str):
                raise ConfigError("continue_final_message needs a last message with text")
            given[-1]["content"] = final + _CONTINUE
        template = self._compiled(chat_template)
        try:
            text = template.render(messages=given, **known, **self.special_tokens, **extra)
        except (jinja2.TemplateError, *_RENDERING) as refused:
            raise ConfigError(f"the model's chat template refuses these messages: {_first_line(refused)}") from None
        if not continue_final_message:
            return text
        at = text.rfind(_CONTINUE.strip())
        if at < 0:
            raise ConfigError("the model's chat template drops the final message; it cannot be continued")
        # A template that trims contents has taken the mark's own space away; what stood before it goes, too.
        return text[:at] if text.startswith(_CONTINUE, at) else text[:at].rstrip()

    def template_variables(self, chat_template: str | None = None) -> frozenset[str]:
        """The names that the chat template looks up: whether it knows ``tools``, say. Raises as rendering does."""
        self._compiled(chat_template)
        return _variables(self._source(chat_template))

    def _source(self, chat_template: str | None) -> str:
        source = self.chat_template if chat_template is None else chat_template
        if source is None:
            raise ConfigError(
                "this model has no chat template (neither chat_template.jinja nor chat_template in "
                "tokenizer_config.json); give plain prompts instead of messages"
            )
        return source

    def _compiled(self, chat_template: str | None) -> jinja2.Template:
        return compile_chat_template(self._source(chat_template))

    def _raw(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.encode()
        token = self.token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            table = _byte_level_table()
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
        if token_id in self.byte_token_ids:
            return bytes([int(token[3:5], 16)])
        if self._spells_spaces:
            return token.replace("▁", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    @cached_property
    def _decoder(self) -> str:
        """The decoder's settings as JSON; empty where there is none."""
        decoder: Any = self._fast.decoder
        return "" if decoder is None else decoder.__getstate__().decode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in self._decoder

    @cached_property
    def _spells_spaces(self) -> bool:
        """Whether "▁" stands for a space (SentencePiece's vocabularies)."""
        return "▁" in json.dumps(json.loads(self._decoder or "null"), ensure_ascii=False)


_RENDERING = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def _check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, as mappings of their own."""
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
    return [dict(m) for m in messages]


def _spells_all(fast: FastTokenizer) -> bool:
    """Whether text that is in no token is spelled in bytes."""
    model = fast.model
    return type(model).__name__ == "BPE" and (model.byte_fallback or model.unk_token is None)


def compile_chat_template(source: str) -> jinja2.Template:
    """Raises ConfigError if it is no template."""
    import jinja2

    try:
        return _compile(source)
    except jinja2.TemplateError as broken:
        raise ConfigError(f"the model's chat template is broken: {_first_line(broken)}") from None


@lru_cache(maxsize=_MAX_TEMPLATES)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=_MAX_TEMPLATES)
def _variables(source: str) -> frozenset[str]:
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_environment().parse(source)))


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """As transformers has it (``utils/chat_template_utils.py``)."""
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
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest for characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


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
