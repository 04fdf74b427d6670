import pytest
from hypothesis import given
from hypothesis import strategies as st

from undermesh.api.identity import ObjectKey, ObjectRef, SpiffeId, workload_uid

LABEL = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,8}[a-z0-9])?\Z")


@given(st.from_regex(r"\A[a-z0-9._-]{1,12}\Z"), LABEL, LABEL)
def test_an_identity_reads_back_as_itself(trust_domain: str, namespace: str, account: str) -> None:
    identity = SpiffeId(trust_domain, namespace, account)
    assert SpiffeId.parse(str(identity)) == identity
    assert str(identity) == f"spiffe://{identity.principal}"


@given(st.text(max_size=40), st.text(max_size=20), st.text(max_size=20))
def test_no_parts_build_an_identity_that_reads_back_as_another(td: str, namespace: str, account: str) -> None:
    try:
        identity = SpiffeId(td, namespace, account)
    except ValueError:
        return
    assert SpiffeId.parse(str(identity)) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "cluster.local/ns/a/sa/b",
        "https://cluster.local/ns/a/sa/b",
        "SPIFFE://cluster.local/ns/a/sa/b",
        "spiffe:///ns/a/sa/b",
        "spiffe://cluster.local",
        "spiffe://cluster.local/ns/a/sa/",
        "spiffe://cluster.local/ns//sa/b",
        "spiffe://cluster.local/ns/a/sa/b/",
        "spiffe://cluster.local/ns/a/sa/b/c",
        "spiffe://cluster.local/ns/a/b/sa/c",
        "spiffe://cluster.local/sa/b/ns/a",
        "spiffe://Cluster.local/ns/a/sa/b",
        "spiffe://cluster.local:443/ns/a/sa/b",
        "spiffe://user@cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/sa/b?x",
        "spiffe://cluster.local/ns/a/sa/b#x",
        "spiffe://cluster.local/ns/a/sa/b%2fc",
        "spiffe://cluster.local/ns/a/sa/b\n",
        "spiffe://cluster.local/ns/a/sa/b\0",
        " spiffe://cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/../sa/b",
        "spiffe://cluster.local/ns/A/sa/b",
    ],
)
def test_a_uri_of_another_shape_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="not a workload identity"):
        SpiffeId.parse(uri)


def test_references_read_as_users_write_them() -> None:
    assert str(ObjectRef("Pod", ObjectKey("shop", "web"))) == "Pod shop/web"
    assert str(ObjectRef("Node", ObjectKey("", "n1"))) == "Node n1"
    assert workload_uid("Kubernetes", "shop", "web") == "Kubernetes//Pod/shop/web"
