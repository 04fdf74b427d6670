"""How connections become edges."""

from undermesh.cli import edge_list
from undermesh.cli.answers import Connection

CLIENT, SERVER = "spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/store"


def connection(**fields: object) -> Connection:
    """One from web-0 to store-0."""
    standard: dict[str, object] = {
        "direction": "outbound",
        "lane": "hbone",
        "source": "10.1.1.2:5000",
        "source_workload": "shop/web-0",
        "source_identity": CLIENT,
        "destination": "10.1.2.3:80",
        "destination_workload": "shop/store-0",
        "destination_identity": SERVER,
        "bytes_sent": 10,
        "bytes_received": 1,
    }
    return Connection(**{**standard, **fields})  # type: ignore[arg-type]


def test_connections_of_the_same_parties_are_added_up() -> None:
    (edge,) = edge_list.of([connection(), connection(source="10.1.1.2:5001", bytes_sent=5)])
    assert (edge.connections, edge.bytes_sent, edge.bytes_received) == (2, 15, 2)
    assert (edge.source, edge.destination) == ("shop/web-0", "shop/store-0:80")


def test_another_port_or_lane_is_another_edge() -> None:
    assert len(edge_list.of([connection(), connection(destination="10.1.2.3:81"), connection(lane="plain")])) == 3


def test_an_edge_is_secured_if_both_ends_have_proven_themselves() -> None:
    def secured(**fields: object) -> bool:
        (edge,) = edge_list.of([connection(**fields)])
        return edge.secured

    assert secured()
    assert secured(direction="inbound", destination_identity="")
    assert not secured(destination_identity="")
    assert not secured(direction="inbound", source_identity="", destination_identity="")
