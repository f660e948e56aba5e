"""Backends place workers and carry bytes to them. Imported as ``lightvllm.backends``."""
