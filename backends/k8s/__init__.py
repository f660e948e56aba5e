"""The Kubernetes backend: worker servers behind authenticated gRPC. Imported as ``lightvllm.backends.k8s``."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # grpc's own log would add lines to errors that are said in one
