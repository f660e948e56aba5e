"""The `lightvllm` command line: one module per sub-command, assembled in ``main``."""
