"""A client of uncloud that was made from nothing but server reflection: create a VM, watch it run, delete it.

    client.py HOST:PORT IMAGE

It has no generated code and no .proto file. Prints a line for each step; ends with an error if one does not hold.
"""

import sys
import time

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

LIMIT = 30


def main(endpoint, image):
    channel = grpc.insecure_channel(endpoint)
    database = ProtoReflectionDescriptorDatabase(channel)
    services = sorted(database.get_services())
    print("services", " ".join(services))
    for name in ("VmService", "HostService", "ImageService", "ClusterService"):
        assert f"uncloud.v1.{name}" in services, f"reflection does not list {name}"
    pool = descriptor_pool.DescriptorPool(database)

    def call(service, method, **fields):
        """Calls any method by its name; fields are those of the request."""
        description = pool.FindServiceByName(service).FindMethodByName(method)
        request_class = message_factory.GetMessageClass(description.input_type)
        answer_class = message_factory.GetMessageClass(description.output_type)
        kind = channel.unary_stream if description.server_streaming else channel.unary_unary
        stub = kind(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer_class.FromString,
        )
        return stub(request_class(**fields), timeout=LIMIT)

    health = call("grpc.health.v1.Health", "Check")
    status = health.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number[health.status].name
    print("health", status)
    assert status == "SERVING"

    spec = {"memory_mib": 16, "machine": "pc", "disks": [{"image": image}]}
    vm = call("uncloud.v1.VmService", "CreateVm", name="from-python", spec=spec).vm
    print("created", vm.id, vm.name, "MAC" if vm.spec.nics else "no NIC")

    phases = pool.FindEnumTypeByName("uncloud.v1.VmPhase").values_by_number
    watch = call("uncloud.v1.VmService", "WatchVms", vm=vm.id)
    for step in watch:
        if step.WhichOneof("event") != "vm":
            continue
        phase = phases[step.vm.status.phase].name
        print("phase", phase)
        if phase == "VM_PHASE_RUNNING":
            print("running on", step.vm.placement.host_name, "incarnation", step.vm.placement.incarnation)
            break
        assert phase != "VM_PHASE_FAILED", step.vm.status.reason
    watch.cancel()

    # A refusal has a code, words, and details that name the field: their descriptors come by reflection, too.
    try:
        call("uncloud.v1.VmService", "CreateVm", name="../x", spec=spec)
        raise AssertionError("a name that climbs was taken")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        details = dict(error.trailing_metadata())["grpc-status-details-bin"]
        Status = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.rpc.Status"))
        BadRequest = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.rpc.BadRequest"))
        fields = []
        for detail in Status.FromString(details).details:
            if detail.type_url.endswith("google.rpc.BadRequest"):
                fields += [v.field for v in BadRequest.FromString(detail.value).field_violations]
        print("refused", error.code().name, "fields", fields)
        assert fields == ["name"], fields

    call("uncloud.v1.VmService", "DeleteVm", vm=vm.id)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        try:
            call("uncloud.v1.VmService", "GetVm", vm=vm.id)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error
            print("gone")
            return
        time.sleep(0.1)
    raise AssertionError("the VM does not go")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
