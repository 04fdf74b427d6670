"""kubernetes.default and the property: a selector service is the same with and without slices."""

from hypothesis import given
from hypothesis import strategies as st
from test_translate_endpoints import KUBERNETES, at, ref, slice_
from test_translate_snapshot import pod, run, svc

from undermesh.controlplane.translate import ADDRESS_TYPE, ResourceKey
from undermesh.proto import workload_pb2 as wds

API = "clusterIP: 10.96.0.1, ports: [{name: https, port: 443, targetPort: 6443}]"


def test_the_api_server_is_a_plain_endpoint_at_its_nodes_address() -> None:
    mine = slice_(
        at("172.30.0.1"),
        name="kubernetes",
        namespace="default",
        service="kubernetes",
        ports="{name: https, port: 6443}",
    )
    translation = run(svc("kubernetes", API, "default"), mine)
    key = ResourceKey(ADDRESS_TYPE, "Kubernetes/discovery.k8s.io/EndpointSlice/default/kubernetes/172.30.0.1")
    found = wds.Address.FromString(translation.resources[key].body).workload
    assert (found.status, found.tunnel_protocol, found.service_account) == (wds.HEALTHY, wds.NONE, "")
    assert found.services == {
        "default/kubernetes.default.svc.cluster.local": wds.PortList(
            ports=[wds.Port(service_port=443, target_port=6443)]
        )
    }


STATUS = st.sampled_from(["", "conditions: [{type: Ready, status: 'False'}]", "phase: Succeeded"])
PORTS = st.sampled_from(["{port: 80}", "{port: 80, targetPort: http}", "{name: a, port: 80, targetPort: 81}"])
CONTAINERS = st.sampled_from(["", "containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]"])
CONDITIONS = st.sampled_from(
    [
        "",
        "conditions: {ready: false}",
        "conditions: {ready: true}",
        "conditions: {ready: false, serving: true, terminating: true}",
    ]
)


@given(
    pods=st.lists(st.tuples(st.sampled_from(["app: web", "app: x"]), STATUS, CONTAINERS, CONDITIONS), max_size=4),
    ports=PORTS,
    publish=st.booleans(),
    number=st.integers(1, 65535),
)
def test_a_selector_service_is_the_same_with_and_without_kubernetes_slices(
    pods: list[tuple[str, str, str, str]], ports: str, publish: bool, number: int
) -> None:
    spec = f"selector: {{app: web}}, ports: [{ports}], publishNotReadyAddresses: {str(publish).lower()}"
    texts = [svc("s", spec)]
    ends = []
    for i, (labels, status, containers, conditions) in enumerate(pods, 1):
        texts.append(pod(f"p{i}", labels=labels, spec=containers, status=f"podIPs: [{{ip: 10.1.0.{i}}}], {status}"))
        ends.append(at(f"10.1.0.{i}", f"{ref(f'p{i}')}, {conditions}"))
    item = slice_(", ".join(ends), labels=KUBERNETES, ports=f"{{name: a, port: {number}}}, {{port: {number}}}")
    assert run(*texts, item).resources == run(*texts).resources
