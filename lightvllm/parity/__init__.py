"""Parity: one model, several executors and layouts, one answer; or the exact place where the answers part.

``prompts`` what is asked · ``run`` the engines, one after another · ``reference`` transformers' answer ·
``compare`` finds the differences (pure) · ``report`` shows them.
"""
