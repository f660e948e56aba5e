"""Models on disk: known models fetched and converted, kept in a cache folder, and found again by name.

Imports neither torch nor transformers; ``gguf``, ``tokenizers`` and ``huggingface_hub`` are imported when used.
"""

from lightvllm.hub.catalogue import KNOWN_MODELS, KnownModel
from lightvllm.hub.locate import resolve
from lightvllm.hub.store import get, installed, model_dir, remove

__all__ = ["KNOWN_MODELS", "KnownModel", "get", "installed", "model_dir", "remove", "resolve"]
