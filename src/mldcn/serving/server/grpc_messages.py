"""The messages of the Open Inference Protocol's gRPC service, made at import from the protocol's field numbers.

They lie in a descriptor pool of their own: a client library of the same protocol can be loaded beside them. The
tensors of shared memory, tracing and streaming, which are not of the protocol's core, are left out.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int64": _Field.TYPE_INT64,
    "uint64": _Field.TYPE_UINT64,
    "int32": _Field.TYPE_INT32,
    "uint32": _Field.TYPE_UINT32,
    "bool": _Field.TYPE_BOOL,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}

# Message: its fields as "type name number". ``*`` is repeated, ``?`` one of a choice, ``{}`` a map from text.
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live 1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready 1",
    "ModelReadyRequest": "string name 1; string version 2",
    "ModelReadyResponse": "bool ready 1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name 1; string version 2; *string extensions 3",
    "ModelMetadataRequest": "string name 1; string version 2",
    "ModelMetadataResponse": "string name 1; *string versions 2; string platform 3; *.TensorMetadata inputs 4; "
    "*.TensorMetadata outputs 5",
    "ModelMetadataResponse.TensorMetadata": "string name 1; string datatype 2; *int64 shape 3",
    "InferParameter": "?bool bool_param 1; ?int64 int64_param 2; ?string string_param 3; ?double double_param 4; "
    "?uint64 uint64_param 5",
    "InferTensorContents": "*bool bool_contents 1; *int32 int_contents 2; *int64 int64_contents 3; "
    "*uint32 uint_contents 4; *uint64 uint64_contents 5; *float fp32_contents 6; *double fp64_contents 7; "
    "*bytes bytes_contents 8",
    "ModelInferRequest": "string model_name 1; string model_version 2; string id 3; "
    "{}InferParameter parameters 4; *.InferInputTensor inputs 5; "
    "*.InferRequestedOutputTensor outputs 6; *bytes raw_input_contents 7",
    "ModelInferRequest.InferInputTensor": "string name 1; string datatype 2; *int64 shape 3; "
    "{}InferParameter parameters 4; InferTensorContents contents 5",
    "ModelInferRequest.InferRequestedOutputTensor": "string name 1; {}InferParameter parameters 2",
    "ModelInferResponse": "string model_name 1; string model_version 2; string id 3; "
    "{}InferParameter parameters 4; *.InferOutputTensor outputs 5; *bytes raw_output_contents 6",
    "ModelInferResponse.InferOutputTensor": "string name 1; string datatype 2; *int64 shape 3; "
    "{}InferParameter parameters 4; InferTensorContents contents 5",
    "ModelRepositoryParameter": "?bool bool_param 1; ?int64 int64_param 2; ?string string_param 3; "
    "?bytes bytes_param 4",
    "RepositoryIndexRequest": "string repository_name 1; bool ready 2",
    "RepositoryIndexResponse": "*.ModelIndex models 1",
    "RepositoryIndexResponse.ModelIndex": "string name 1; string version 2; string state 3; string reason 4",
    "RepositoryModelLoadRequest": "string repository_name 1; string model_name 2; "
    "{}ModelRepositoryParameter parameters 3",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "string repository_name 1; string model_name 2; "
    "{}ModelRepositoryParameter parameters 3",
    "RepositoryModelUnloadResponse": "",
}


def _add_field(message: descriptor_pb2.DescriptorProto, path: str, text: str) -> None:
    kind, name, number = text.split()
    added = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    mark = kind[:2] if kind.startswith("{}") else kind[:1]
    if mark in ("*", "{}"):
        added.label = _Field.LABEL_REPEATED
    if mark == "?":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        added.oneof_index = 0
    kind = kind.lstrip("*?{}")
    if mark == "{}":
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, f"{path}.{entry.name}", "string key 1")
        _add_field(entry, f"{path}.{entry.name}", f"{kind} value 2")
        kind = f".{entry.name}"
    if kind in _TYPES:
        added.type = _TYPES[kind]
    else:
        added.type = _Field.TYPE_MESSAGE
        added.type_name = f".inference.{path}{kind}" if kind.startswith(".") else f".inference.{kind}"


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="mldcn_open_inference.proto", package="inference", syntax="proto3"
    )
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for path, fields in _MESSAGES.items():
        outer, _, name = path.rpartition(".")
        made[path] = made[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
        for text in filter(None, fields.split("; ")):
            _add_field(made[path], path, text)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        path: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{path}"))
        for path in made
    }


MESSAGES: dict[str, Any] = _messages()
