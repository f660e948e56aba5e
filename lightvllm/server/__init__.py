"""The HTTP server: OpenAI's API over an ``EngineClient``; metrics, traces, logs and the status page.

Knows the engine by ``lightvllm.engine.protocol`` alone; imports fastapi when an app is made.
"""
