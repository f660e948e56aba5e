"""The Ray backend. Imported as ``lightvllm.backends.ray``; ``import ray`` below it means the real one."""

if __name__ == "ray":
    raise ImportError(
        "the folder 'backends/' is on sys.path, so that 'import ray' finds lightvllm's backend instead of Ray; "
        "remove it from sys.path (PYTHONPATH) and import lightvllm.backends.ray"
    )
