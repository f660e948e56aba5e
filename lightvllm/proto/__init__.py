"""Generated from proto/worker.proto by ``python proto/generate.py``; never edited by hand."""
