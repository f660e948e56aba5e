"""Bytes and tensors from process to process: framed sockets, and the hand-over between pipeline stages."""
