"""The worker of ``rpc.py``: a no-op, in a module that imports nothing, so that any contender can use it."""


class EchoWorker:
    def echo(self, payload: bytes) -> None:
        """Nothing is done with ``payload``."""
