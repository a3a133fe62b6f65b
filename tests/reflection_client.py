"""What grpcurl does, in Python: a client that knows nothing of a service but what the server's reflection tells it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

_TIMEOUT_S = 30.0


def grpcurl(words: Sequence[str]) -> str:
    """Return what `grpcurl WORDS` prints: names, a definition's fields, or an answer as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-d", default="{}")
    parser.add_argument("target")
    parser.add_argument("verb_or_method")
    parser.add_argument("symbol", nargs="?")
    options = parser.parse_args(words)
    with grpc.insecure_channel(options.target) as channel:
        client = ReflectionClient(channel)
        if options.verb_or_method == "list":
            return "\n".join(client.services())
        if options.verb_or_method == "describe":
            return "\n".join(client.fields_of(options.symbol))
        return client.call(options.verb_or_method, options.d)


class ReflectionClient:
    """Calls any unary method of a server by name, with JSON."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        self._pool = descriptor_pool.DescriptorPool()  # its own: nothing of this process's generated code is in it

    def services(self) -> list[str]:
        """Return the names of all services."""
        answer = self._ask(reflection_pb2.ServerReflectionRequest(list_services=""))
        return sorted(service.name for service in answer.list_services_response.service)

    def fields_of(self, message: str) -> list[str]:
        """Return the names of a message's fields."""
        self._learn(reflection_pb2.ServerReflectionRequest(file_containing_symbol=message))
        return [field.name for field in self._pool.FindMessageTypeByName(message).fields]

    def describe(self, service: str) -> ServiceDescriptor:
        """Return a service's methods and their messages."""
        self._learn(reflection_pb2.ServerReflectionRequest(file_containing_symbol=service))
        return self._pool.FindServiceByName(service)

    def call(self, path: str, request_json: str) -> str:
        """Call `package.Service/Method`; return the answer as JSON."""
        service, _, method = path.partition("/")
        described = self.describe(service).FindMethodByName(method)
        request = message_factory.GetMessageClass(described.input_type)()
        json_format.ParseDict(json.loads(request_json), request, descriptor_pool=self._pool)
        send = self._channel.unary_unary(
            f"/{path}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        return json_format.MessageToJson(send(request, timeout=_TIMEOUT_S), descriptor_pool=self._pool)

    def _ask(self, request: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
        (answer,) = self._stub.ServerReflectionInfo(iter([request]), timeout=_TIMEOUT_S)
        assert not answer.HasField("error_response"), answer.error_response
        return answer

    def _learn(self, request: reflection_pb2.ServerReflectionRequest) -> None:
        """Add the files of an answer, after those that they import."""
        files = {file.name: file for file in self._files(request)}
        for file in files.values():
            self._add(file, files)

    def _add(
        self, file: descriptor_pb2.FileDescriptorProto, known: dict[str, descriptor_pb2.FileDescriptorProto]
    ) -> None:
        for name in file.dependency:
            if name not in known:
                (known[name],) = self._files(reflection_pb2.ServerReflectionRequest(file_by_filename=name))
            self._add(known[name], known)
        self._pool.Add(file)

    def _files(self, request: reflection_pb2.ServerReflectionRequest) -> Iterator[descriptor_pb2.FileDescriptorProto]:
        for serialized in self._ask(request).file_descriptor_response.file_descriptor_proto:
            yield descriptor_pb2.FileDescriptorProto.FromString(serialized)
