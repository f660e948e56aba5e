"""The driver's side of a model: requests, scheduler, block manager, tokenizer, the step loop, and ``LLM``.

Imports no torch. A request's way through it: ``llm``, ``engine``, ``scheduler`` (with ``block_manager``), the executor,
then ``engine`` again, ``request`` (with ``detokenizer``) and ``outputs``.
"""
