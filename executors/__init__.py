"""The abstract ``Executor`` (vLLM's names) and the one that drives workers through a ``Backend``.

Imported as ``lightvllm.executors``.
"""
