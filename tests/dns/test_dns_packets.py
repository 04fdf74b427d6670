"""From packets to packets, without sockets."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from dns_objects import SHOP
from hypothesis import given
from hypothesis import strategies as st

from undermesh.lab.dns.reply import TTL, reply
from undermesh.lab.dns.zone import Zone

ZONE = Zone("cluster.local", SHOP)
WEB = "web.shop.svc.cluster.local."


def ask(name: str, kind: str = "A", *, zone: Zone | None = ZONE, tcp: bool = False, **more: int) -> dns.message.Message:
    query = dns.message.make_query(name, kind, **more)
    packet = reply(query.to_wire(), zone, tcp=tcp)
    assert packet is not None
    answer = dns.message.from_wire(packet)
    assert query.is_response(answer) or answer.rcode() != dns.rcode.NOERROR
    return answer


def test_an_address_is_answered_with_authority() -> None:
    answer = ask(WEB)
    assert [rrset.to_text() for rrset in answer.answer] == [f"{WEB} {TTL} IN A 10.96.0.5"]
    assert answer.flags & dns.flags.AA and answer.flags & dns.flags.RA and not answer.authority


def test_the_answer_keeps_the_letters_of_the_question() -> None:
    assert ask("wEb.Shop.SVC.cluster.LOCAL.").answer[0].name.to_text() == "wEb.Shop.SVC.cluster.LOCAL."


@pytest.mark.parametrize(
    ("name", "kind", "rcode", "zone"),
    [
        pytest.param(WEB, "MX", dns.rcode.NOERROR, "cluster.local.", id="no data of that type"),
        pytest.param("none.shop.svc.cluster.local.", "A", dns.rcode.NXDOMAIN, "cluster.local.", id="no such name"),
        pytest.param("example.com.", "A", dns.rcode.NXDOMAIN, ".", id="outside"),
        pytest.param("9.9.9.9.in-addr.arpa.", "PTR", dns.rcode.NXDOMAIN, "in-addr.arpa.", id="nobody's address"),
    ],
)
def test_a_negative_answer_carries_the_soa_of_its_zone(name: str, kind: str, rcode: int, zone: str) -> None:
    answer = ask(name, kind)
    assert (answer.rcode(), answer.answer) == (rcode, [])
    (soa,) = answer.authority
    assert (soa.name.to_text(), soa.ttl, soa[0].minimum) == (zone, TTL, TTL)


def test_an_srv_answer_brings_the_addresses_of_its_targets() -> None:
    answer = ask("_http._tcp.db.shop.svc.cluster.local.", "SRV")
    assert {rdata.target.to_text() for rdata in answer.answer[0]} == {
        rrset.name.to_text() for rrset in answer.additional
    }


def test_an_external_name_inside_the_cluster_is_followed() -> None:
    answer = ask("near.shop.svc.cluster.local.")
    assert [rrset.rdtype for rrset in answer.answer] == [dns.rdatatype.CNAME, dns.rdatatype.A]


def test_an_external_name_that_leads_to_itself_ends() -> None:
    assert [rrset.rdtype for rrset in ask("loop.shop.svc.cluster.local.").answer] == [dns.rdatatype.CNAME]


def test_an_answer_too_long_for_udp_says_so_and_comes_whole_by_tcp() -> None:
    name = "many.shop.svc.cluster.local."
    short, longer, whole = ask(name), ask(name, use_edns=0, payload=4096), ask(name, tcp=True)
    assert short.flags & dns.flags.TC and longer.flags & dns.flags.TC and not whole.flags & dns.flags.TC
    assert len(whole.answer[0]) == 250
    packets = [
        reply(dns.message.make_query(name, "A", use_edns=edns, payload=4096).to_wire(), ZONE) for edns in (False, 0)
    ]
    assert [len(packet or b"") <= limit for packet, limit in zip(packets, (512, 1232), strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("rcode", "change"),
    [
        pytest.param(dns.rcode.NOTIMP, {"opcode": 5}, id="an update"),
        pytest.param(dns.rcode.REFUSED, {"kind": "AXFR"}, id="a transfer"),
        pytest.param(dns.rcode.REFUSED, {"rdclass": "CH"}, id="another class"),
        pytest.param(dns.rcode.BADVERS, {"edns": 1}, id="a later EDNS"),
    ],
)
def test_what_is_no_plain_question_is_refused(rcode: int, change: dict[str, str | int]) -> None:
    query = dns.message.make_query(
        WEB, str(change.get("kind", "A")), str(change.get("rdclass", "IN")), use_edns=change.get("edns")
    )
    packet = bytearray(query.to_wire())
    packet[2] |= int(change.get("opcode", 0)) << 3
    answer = reply(bytes(packet), ZONE)
    assert answer is not None
    assert answer[:2] == packet[:2] and dns.message.from_wire(answer).rcode() == rcode


def test_before_the_cluster_is_known_the_answer_is_to_ask_again() -> None:
    assert ask(WEB, zone=None).rcode() == dns.rcode.SERVFAIL


def test_an_answer_is_not_answered() -> None:
    query = dns.message.make_query(WEB, "A")
    assert reply(dns.message.make_response(query).to_wire(), ZONE) is None


@given(st.binary(max_size=300))
def test_no_packet_breaks_it(packet: bytes) -> None:
    check(packet)


@given(st.data())
def test_no_damaged_question_breaks_it(data: st.DataObject) -> None:
    packet = bytearray(dns.message.make_query(WEB, "A", use_edns=0).to_wire())
    for _ in range(data.draw(st.integers(1, 6))):
        packet[data.draw(st.integers(2, len(packet) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(packet[: data.draw(st.integers(0, len(packet)))]))


def check(packet: bytes) -> None:
    answer = reply(packet, ZONE)
    assert answer is None or (answer[:2] == packet[:2] and answer[2] & 0x80)


@given(st.lists(st.binary(min_size=1, max_size=63), max_size=3), st.integers(1, 65535))
def test_no_name_or_type_breaks_it(labels: list[bytes], kind: int) -> None:
    name = dns.name.Name([*labels, b"shop", b"svc", b"cluster", b"local", b""])
    query = dns.message.Message()
    query.question.append(dns.rrset.RRset(name, dns.rdataclass.IN, dns.rdatatype.RdataType.make(kind)))
    check(query.to_wire())
