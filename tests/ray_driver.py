"""A driver for the tests that end one: places one worker on a local Ray cluster, has it hang, and waits for its end.

``python ray_driver.py WORKER_CLASS FLAG``: standard output tells the progress, then ``calling``; the call touches FLAG.
A Ctrl-C is answered with ``shutdown``, as a program would.
"""

import sys

from lightvllm.backends.base import Placement
from lightvllm.backends.ray.backend import RayBackend
from lightvllm.messages import encode_call

if __name__ == "__main__":
    backend = RayBackend()
    try:
        (worker,) = backend.place(
            Placement(world_size=1, worker_class=sys.argv[1]),
            lambda *_: None,
            60.0,
            lambda text: print(text, flush=True),
        )
        future = backend.call(worker, *encode_call("touch_and_hang", (sys.argv[2],), None))
        print("calling", flush=True)
        future.result(60.0)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        backend.shutdown()
