"""From the packet of a question to the packet of its answer."""

from __future__ import annotations

import random

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from undermesh.lab.dns.zone import Found, Labels, Record, Zone

TTL = 5
"""Seconds, as CoreDNS' default; also for names that do not exist."""
_SERIAL = 1
_LARGEST = 1232
"""Bytes of a UDP answer at most, however much a client allows: https://www.dnsflagday.net/2020/"""
_SMALLEST = 512
_HEADER = 12
_RESPONSE, _OPCODE, _RECURSION_DESIRED = 0x80, 0x78, 0x01
"""In the third byte."""
_CHAIN = 8
"""Names that an ExternalName may lead through inside the cluster."""


def reply(packet: bytes, zone: Zone | None, *, tcp: bool = False) -> bytes | None:
    """The answer to one packet, None if it deserves none: too short, or itself an answer.

    Args:
        packet: any bytes that came.
        zone: None before the objects of the cluster are known: SERVFAIL, so that clients ask again.
        tcp: the answer may be as long as it wants.
    """
    if len(packet) < _HEADER or packet[2] & _RESPONSE:
        return None
    if packet[2] & _OPCODE:
        return _bare(packet, dns.rcode.NOTIMP)
    try:
        query = dns.message.from_wire(packet, ignore_trailing=False)
    except dns.exception.DNSException:
        return _bare(packet, dns.rcode.FORMERR)
    response = dns.message.make_response(query, recursion_available=True, our_payload=_LARGEST)
    response.set_rcode(_refusal(query, zone))
    if response.rcode() == dns.rcode.NOERROR and zone is not None:
        response.flags |= dns.flags.AA
        _answer(query, response, zone)
    limit = 65535 if tcp else _limit(query)
    return response.to_wire(max_size=limit, prefer_truncation=True)


def _bare(packet: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """A header alone, for what could not be read."""
    flags = (packet[2] & (_OPCODE | _RECURSION_DESIRED)) | _RESPONSE
    return packet[:2] + bytes([flags, rcode]) + bytes(8)


def _refusal(query: dns.message.Message, zone: Zone | None) -> dns.rcode.Rcode:
    """NOERROR if it is a question that can be answered."""
    if query.edns > 0:
        return dns.rcode.BADVERS
    if len(query.question) != 1:
        return dns.rcode.FORMERR
    question = query.question[0]
    if question.rdclass != dns.rdataclass.IN or question.rdtype in (dns.rdatatype.AXFR, dns.rdatatype.IXFR):
        return dns.rcode.REFUSED
    return dns.rcode.SERVFAIL if zone is None else dns.rcode.NOERROR


def _limit(query: dns.message.Message) -> int:
    return min(max(query.payload, _SMALLEST), _LARGEST) if query.edns >= 0 else _SMALLEST


def _answer(query: dns.message.Message, response: dns.message.Message, zone: Zone) -> None:
    question = query.question[0]
    labels = _labels(question.name)
    found = zone.find(labels)
    _put(response.answer, found.records, question.rdtype, question.name)
    seen = {labels}
    while (alias := _alias(found, question.rdtype)) is not None:
        labels = _labels(alias)
        if zone.origin(labels) != zone.domain or labels in seen or len(seen) >= _CHAIN:
            return
        seen.add(labels)
        found = zone.find(labels)
        _put(response.answer, found.records, question.rdtype, alias)
    if not found.exists:
        response.set_rcode(dns.rcode.NXDOMAIN)
    wanted = {dns.rdatatype.to_text(question.rdtype), "ANY" if question.rdtype == dns.rdatatype.ANY else ""}
    origin = zone.origin(labels)
    at_origin = ".".join(labels) == origin
    if at_origin and question.rdtype == dns.rdatatype.SOA:
        response.answer.append(_soa(origin, zone.domain))
    elif not any(record.type in wanted or "ANY" in wanted for record in found.records):
        response.authority.append(_soa(origin, zone.domain))
    _put(response.additional, found.additional if question.rdtype == dns.rdatatype.SRV else (), dns.rdatatype.ANY)


def _labels(name: dns.name.Name) -> Labels:
    """In lower case; bytes that are no ASCII become what no object can be called."""
    return tuple(label.decode("ascii", "replace").lower() for label in name.labels if label)


def _alias(found: Found, kind: dns.rdatatype.RdataType) -> dns.name.Name | None:
    if kind in (dns.rdatatype.CNAME, dns.rdatatype.ANY):
        return None
    for record in found.records:
        if record.type == "CNAME":
            return dns.name.from_text(record.value)
    return None


def _put(
    section: list[dns.rrset.RRset],
    records: tuple[Record, ...],
    kind: dns.rdatatype.RdataType,
    asked: dns.name.Name | None = None,
) -> None:
    """Add what was asked for, in random order so that clients spread, under the name in the letters it was asked."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if kind == dns.rdatatype.ANY or record.type in (dns.rdatatype.to_text(kind), "CNAME"):
            grouped.setdefault((record.name, record.type), []).append(record.value)
    for (name, type_), values in grouped.items():
        random.shuffle(values)
        section.append(dns.rrset.from_text_list(asked or dns.name.from_text(name), TTL, "IN", type_, values))


def _soa(origin: str, domain: str) -> dns.rrset.RRset:
    value = f"ns.dns.{domain}. hostmaster.{domain}. {_SERIAL} 7200 1800 86400 {TTL}"
    return dns.rrset.from_text(f"{origin}.", TTL, "IN", "SOA", value)
