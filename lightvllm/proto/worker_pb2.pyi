from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class InitWorkerRequest(_message.Message):
    __slots__ = ("worker_class", "env")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_CLASS_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    worker_class: str
    env: _containers.ScalarMap[str, str]
    def __init__(self, worker_class: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ...) -> None: ...

class InitWorkerReply(_message.Message):
    __slots__ = ("failure", "python_version", "lightvllm_version", "pid", "node", "device_ids", "max_message_bytes")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PYTHON_VERSION_FIELD_NUMBER: _ClassVar[int]
    LIGHTVLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    failure: bytes
    python_version: str
    lightvllm_version: str
    pid: int
    node: str
    device_ids: _containers.RepeatedScalarFieldContainer[str]
    max_message_bytes: int
    def __init__(self, failure: _Optional[bytes] = ..., python_version: _Optional[str] = ..., lightvllm_version: _Optional[str] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., device_ids: _Optional[_Iterable[str]] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("sequence_number", "method", "payload")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    method: str
    payload: bytes
    def __init__(self, sequence_number: _Optional[int] = ..., method: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("sequence_number", "payload")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    payload: bytes
    def __init__(self, sequence_number: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...
