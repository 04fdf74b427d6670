"""The verbs that show a table of the agent's or of ztunnel's."""

import time

import click

from undermesh.cli import answers, edge_list, forms, tables
from undermesh.cli.context import Context


@click.command()
@forms.form_option
@click.pass_obj
def status(context: Context, form: str) -> None:
    """The parts of undermesh on this node, and the state of its pods."""
    now = time.time()
    forms.show(context, "/v1/status", answers.Status, form, lambda s: tables.node(s, now), tables.pods)


@click.command()
@forms.form_option
@click.pass_obj
def connections(context: Context, form: str) -> None:
    """Open connections of this node's pods: who talks to whom, how, since when, how much."""
    now = time.time()
    forms.show(context, "/v1/connections", answers.Connections, form, lambda a: tables.connections(a.connections, now))


@click.command()
@forms.form_option
@click.pass_obj
def edges(context: Context, form: str) -> None:
    """Who talks to whom now: the open connections of this node's pods, one row for each pair and way.

    SECURED is yes where both ends have proven their identities. The counts are those of connections that are open.
    """
    answer, _ = context.agent.get("/v1/connections", answers.Connections)
    found = edge_list.of(answer.connections)
    forms.print_as(form, {"edges": [edge_list.plain(edge) for edge in found]}, tables.edges(found))


@click.command()
@forms.form_option
@click.pass_obj
def policies(context: Context, form: str) -> None:
    """The L4 policies that this node's ztunnel enforces, and what they refused or cut."""
    forms.show(context, "/v1/policies", answers.Policies, form, lambda a: tables.policies(a.policies))


@click.command()
@forms.form_option
@click.pass_obj
def certs(context: Context, form: str) -> None:
    """The certificates of the service accounts on this node, and how long they hold."""
    now = time.time()
    forms.show(context, "/v1/certs", answers.Certificates, form, lambda a: tables.certificates(a.certs, now))


@click.command()
@forms.form_option
@click.pass_obj
def workloads(context: Context, form: str) -> None:
    """The workloads that this node's ztunnel knows: who is behind an address, and whether it speaks HBONE."""
    forms.show(context, "/v1/workloads", answers.Workloads, form, lambda a: tables.workloads(a.workloads))


@click.command()
@forms.form_option
@click.pass_obj
def services(context: Context, form: str) -> None:
    """The services that this node's ztunnel knows: their addresses, and how many endpoints they have."""
    forms.show(context, "/v1/services", answers.Services, form, lambda a: tables.services(a.services))


@click.command()
@forms.form_option
@click.pass_obj
def bpf(context: Context, form: str) -> None:
    """The programs, links and maps of undermesh in this node's kernel: what runs, where, how often, how full.

    Runs and their time count only while `sysctl kernel.bpf_stats_enabled` is 1, which costs each run some time.
    """
    forms.show(context, "/v1/bpf", answers.Bpf, form, tables.bpf_programs, tables.bpf_links, tables.bpf_maps)
