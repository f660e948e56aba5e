"""A client of a served model from Python: one question, many, streams, pydantic answers. Speaks OpenAI's API."""
