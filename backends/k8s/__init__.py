"""The Kubernetes backend: worker servers behind authenticated gRPC. Imported as ``lightvllm.backends.k8s``."""
