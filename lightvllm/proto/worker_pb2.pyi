from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Carrier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STREAM: _ClassVar[Carrier]
    DIRECT: _ClassVar[Carrier]
    UNARY: _ClassVar[Carrier]
STREAM: Carrier
DIRECT: Carrier
UNARY: Carrier

class InitWorkerRequest(_message.Message):
    __slots__ = ("worker_class", "env", "carrier", "env_overrides")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class EnvOverridesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_CLASS_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    ENV_OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    worker_class: str
    env: _containers.ScalarMap[str, str]
    carrier: Carrier
    env_overrides: _containers.ScalarMap[str, str]
    def __init__(self, worker_class: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ..., carrier: _Optional[_Union[Carrier, str]] = ..., env_overrides: _Optional[_Mapping[str, str]] = ...) -> None: ...

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
    __slots__ = ("sequence_number", "method", "payload", "total_bytes")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    method: str
    payload: bytes
    total_bytes: int
    def __init__(self, sequence_number: _Optional[int] = ..., method: _Optional[str] = ..., payload: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("sequence_number", "payload", "total_bytes")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    payload: bytes
    total_bytes: int
    def __init__(self, sequence_number: _Optional[int] = ..., payload: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class OpenDirectRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenDirectReply(_message.Message):
    __slots__ = ("address", "ticket")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    address: str
    ticket: bytes
    def __init__(self, address: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class CollectiveRpcRequest(_message.Message):
    __slots__ = ("method", "payload")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    method: str
    payload: bytes
    def __init__(self, method: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...

class CollectiveRpcReply(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    def __init__(self, payload: _Optional[bytes] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class IntermediateTensor(_message.Message):
    __slots__ = ("name", "data", "shape", "dtype", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    offset: int
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class ExecuteModelRequest(_message.Message):
    __slots__ = ("scheduler_output", "grammar_output", "intermediate_tensors")
    SCHEDULER_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_TENSORS_FIELD_NUMBER: _ClassVar[int]
    scheduler_output: bytes
    grammar_output: bytes
    intermediate_tensors: _containers.RepeatedCompositeFieldContainer[IntermediateTensor]
    def __init__(self, scheduler_output: _Optional[bytes] = ..., grammar_output: _Optional[bytes] = ..., intermediate_tensors: _Optional[_Iterable[_Union[IntermediateTensor, _Mapping]]] = ...) -> None: ...

class ExecuteModelReply(_message.Message):
    __slots__ = ("model_output", "intermediate_tensors")
    MODEL_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_TENSORS_FIELD_NUMBER: _ClassVar[int]
    model_output: bytes
    intermediate_tensors: _containers.RepeatedCompositeFieldContainer[IntermediateTensor]
    def __init__(self, model_output: _Optional[bytes] = ..., intermediate_tensors: _Optional[_Iterable[_Union[IntermediateTensor, _Mapping]]] = ...) -> None: ...

class TensorBatch(_message.Message):
    __slots__ = ("channel", "sequence_number", "tensors", "last", "step", "epoch")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    channel: str
    sequence_number: int
    tensors: _containers.RepeatedCompositeFieldContainer[IntermediateTensor]
    last: bool
    step: int
    epoch: int
    def __init__(self, channel: _Optional[str] = ..., sequence_number: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[IntermediateTensor, _Mapping]]] = ..., last: _Optional[bool] = ..., step: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class PushTensorsReply(_message.Message):
    __slots__ = ("sequence_number",)
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    def __init__(self, sequence_number: _Optional[int] = ...) -> None: ...
