"""A shell script or container command that runs ``vllm serve``: what it asks of vLLM, and what else it does.

Knows of shell what such scripts use: simple commands, quotes, assignments, redirections, ``$NAME`` and
``${NAME:-default}`` of variables whose values the manifest tells. What it cannot tell is reported, never guessed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from lightvllm.errors import ConfigError
from lightvllm.operator.convert.options import KNOWN_FLAGS, MODEL_VALUED, SHORT, VALUED, Report, Variable, Wanted, apply

_PUNCTUATION = "();<>|&\n"
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_OUTPUT = "\N{REPLACEMENT CHARACTER}"  # stands for what a command would print
_STARTERS = frozenset({"exec", "nohup", "env", "uv", "run", "python", "python3", "-m", "-u", "--"})
_WAITING = frozenset({"ray", "sleep", "until", "while", "do", "done", "wait", "true", "then", "fi"})


def runs_vllm(script: str) -> bool:
    """Whether there is a vLLM server in it, as far as a glance tells."""
    return re.search(r"\bvllm[\"']?\s+[\"']?serve\b|vllm\.entrypoints\.(openai\.)?api_server", script) is not None


def parse(script: str, known: Mapping[str, str], report: Report, where: str) -> Wanted:
    """What ``script`` asks of vLLM.

    Args:
        known: variables of its container.
        report: is told what is not carried over.
        where: how errors call the place.

    Raises:
        ConfigError: it cannot be understood, or vLLM is run twice or without a model.
    """
    variables, wanted, found = dict(known), Wanted(), False
    for words in _simple_commands(script, where):
        command = _without_redirections(words, report)
        exported = command[:1] == ["export"]
        command = command[1:] if exported else command
        own = {}
        while command and (match := _ASSIGNMENT.fullmatch(command[0])):
            own[match[1]] = command.pop(0).partition("=")[2]
        start = _server(command)
        for name, value in own.items():
            expanded = _expand(value, variables)
            if expanded is None:
                report("lost", f"variable {name}: its value is known in the running container only; set it in spec.env")
                continue
            variables[name] = expanded
            if exported or start is not None:
                wanted.env[name] = Variable(expanded, report)
        if start is None:
            if command and (command[0] in _WAITING or "KUBERAY_GEN_" in command[0]):
                report("replaced", "starting Ray and waiting for it: the leader waits for its workers by itself")
            elif command:
                report("lost", f"command {command[0]}: the pods run vLLM alone; do it in the image")
            continue
        if found:
            raise ConfigError(f"{where} runs vLLM more than once; expected one server")
        found = True
        if unknown := [word for word in command[: start - 2] if word.rpartition("/")[2] not in _STARTERS]:
            kind = unknown[0] == "ray"
            report("replaced" if kind else "lost", f"{unknown[0]}: what stands before vllm is not run")
        _read_options(wanted, command[start:], variables, report, where)
    if not found:
        raise ConfigError(f"{where} does not run vllm serve or vllm.entrypoints.openai.api_server as a command")
    if not wanted.model:
        raise ConfigError(f"{where}: vLLM is run without a model that could be read; put it behind vllm serve")
    return wanted


def _simple_commands(script: str, where: str) -> list[list[str]]:
    """The words of each. A digit before ``>`` is a word of its own."""
    script = re.sub(r"\$\((\w+)\)", r"${\1}", script.replace("\\\n", " "))
    script = re.sub(r"\$\([^()]*\)|`[^`]*`", _OUTPUT, script)
    lexer = shlex.shlex(
        "\n".join(map(_without_comment, script.splitlines())), posix=True, punctuation_chars=_PUNCTUATION
    )
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    commands: list[list[str]] = [[]]
    try:
        for word in lexer:
            if word and set(word) <= set(_PUNCTUATION) and not set(word) & set("<>"):
                commands.append([])
            else:
                commands[-1].append(word)
    except ValueError as error:
        raise ConfigError(f"{where}: no shell command that could be read: {error}") from None
    return [command for command in commands if command]


def _without_comment(line: str) -> str:
    """A # that follows a blank begins one, unless it is quoted."""
    for found in re.finditer(r"(?:^|(?<=\s))#", line):
        before = line[: found.start()]
        if before.count("'") % 2 == before.count('"') % 2 == 0:
            return before
    return line


def _without_redirections(words: list[str], report: Report) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word and set(word) <= set("<>&|"):
            skip = True
            if kept and kept[-1].isdecimal() and len(kept[-1]) == 1:
                kept.pop()
            report("replaced", "redirection: what vLLM prints is the container's log")
        else:
            kept.append(word)
    return kept


def _server(command: list[str]) -> int | None:
    """Where vLLM's own arguments begin."""
    for number in range(len(command) - 1):
        first, second = command[number].rpartition("/")[2], command[number + 1]
        if (first, second) == ("vllm", "serve"):
            return number + 2
        if first == "-m" and second in ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.api_server"):
            return number + 2
    return None


def _expand(word: str, variables: Mapping[str, str]) -> str | None:
    """``word`` with its variables' values; None if one is not known, or a command's output is asked for."""
    missing = False

    def value(match: re.Match[str]) -> str:
        nonlocal missing
        name = match[1] or match[3]
        found = variables.get(name, match[2])
        missing |= found is None
        return found or ""

    result = _VARIABLE.sub(value, word)
    return None if missing or _OUTPUT in result else result


def _read_options(wanted: Wanted, words: list[str], variables: Mapping[str, str], report: Report, where: str) -> None:
    position = 0
    if words and not words[0].startswith("-"):
        wanted.model = _needed(words[0], variables, "the model", where)
        position = 1
    while position < len(words):
        flag, given, inline = words[position].partition("=")
        position += 1
        if not flag.startswith("-"):
            report("lost", f"argument {flag}: not understood")
            continue
        flag = SHORT.get(flag, flag.replace("_", "-") if flag.startswith("--") else flag)
        values = [inline] if given else []
        single = flag in VALUED | MODEL_VALUED and flag != "--served-model-name"
        while not given and flag not in KNOWN_FLAGS and position < len(words):
            if values if single else words[position].startswith("-"):
                break
            values.append(words[position])
            position += 1
        expanded = [_expand(value, variables) for value in values]
        if None in expanded:
            if flag in VALUED:
                _needed(values[expanded.index(None)], variables, flag, where)
            report("lost", f"{flag}: its value is known in the running container only; add it to spec.engine.args")
            continue
        if flag in VALUED and not values:
            raise ConfigError(f"{where}: {flag} has no value")
        apply(wanted, flag, [value for value in expanded if value is not None], report, where)
        if single and wanted.model is None and position < len(words) and not words[position].startswith("-"):
            wanted.model = _needed(words[position], variables, "the model", where)
            position += 1


def _needed(word: str, variables: Mapping[str, str], what: str, where: str) -> str:
    value = _expand(word, variables)
    if value is None:
        raise ConfigError(f"{where}: {what} is {word!r}, whose value the manifest does not tell; write it out")
    return value
