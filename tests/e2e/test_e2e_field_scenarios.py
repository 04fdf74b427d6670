"""Which tests hold what other meshes got wrong in capture and connection semantics; each of them must be there.

The numbers are those of the list of scenarios that the project started from; the words are ours.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

E2E = "e2e/test_e2e_{}.py::{}".format
SCENARIOS = {
    "CAP-01 traffic to the mesh's own ports leads nowhere": [
        E2E("refusals", "test_the_ports_of_other_meshes_proxies_lead_nowhere_and_not_in_circles"),
        E2E("hbone_protocol", "test_bytes_that_are_no_tls_reach_no_app"),
        "mesh/test_mesh_addresses.py::test_the_right_pod_answers",
    ],
    "CAP-02 sockets of IPv6 that dial IPv4": [
        "capture/test_outbound.py::test_an_ipv4_mapped_socket_is_captured_as_ipv4",
        E2E("addresses", "test_a_v4_mapped_address_reaches_the_v4_server"),
        "mesh/test_mesh_addresses.py::test_an_enrolled_pod_uses_tunnels_and_its_log_knows_both_ends",
    ],
    "CAP-03 probes pass whatever others do to the node": [
        "capture/test_repair.py::test_one_iteration_mends_the_node",
        "capture/test_probes.py::test_what_the_node_translates_and_masquerades_is_no_probe",
        "agent/test_agent_reconciler.py::"
        "test_the_probes_of_a_pod_that_the_cni_plugin_brings_meet_its_app_from_the_first_on",
        E2E("probes", "test_a_probe_passes_though_a_policy_denies_plaintext"),
    ],
    "CAP-04 names are the same inside and outside": [
        "mesh/test_mesh_addresses.py::test_names_are_the_same_inside_and_outside_of_the_mesh",
    ],
    "CAP-05 several pods at one address of the host's network": [
        "mesh/test_mesh_addresses.py::test_the_right_pod_answers",
        "mesh/test_mesh_addresses.py::test_who_shows_no_identity_is_refused_where_one_is_demanded",
        "mesh/test_mesh_addresses.py::test_pods_of_the_hosts_network_are_not_enrolled_and_it_is_said_why",
    ],
    "CAP-06 NodePorts into enrolled pods": [
        "mesh/test_mesh_addresses.py::test_the_right_pod_answers",
        "mesh/test_mesh_addresses.py::test_clients_keep_their_addresses",
    ],
    "CAP-07 one pod that cannot be served": [
        E2E("odd_pods", "test_an_odd_pod_works_by_tunnel_or_says_why_it_is_not_enrolled"),
        E2E("addresses", "test_an_app_may_bind_the_ports_that_other_meshes_take"),
        "agent/test_agent_reconciler.py::test_a_pod_without_a_process_is_waited_for_and_says_so",
    ],
    "CON-01 late answers after a half-close": [
        E2E("connection_ends", "test_a_late_large_answer_arrives_after_the_client_half_closed"),
        E2E("connection_ends", "test_a_late_large_question_arrives_after_the_server_half_closed"),
    ],
    "CON-02 aborts arrive as aborts": [
        E2E("connection_ends", "test_a_reset_by_the_server_is_a_reset_for_the_client"),
        E2E("connection_ends", "test_a_reset_by_the_client_is_a_reset_for_the_server"),
        E2E(
            "connection_ends", "test_a_server_process_that_is_killed_resets_or_ends_its_connections_as_the_kernel_does"
        ),
        E2E("refusals", "test_a_port_on_which_nobody_listens_is_refused_at_once"),
        E2E("pod_deletion", "test_of_a_deleted_pod_nothing_is_left_and_its_successor_has_only_its_own_identity"),
    ],
    "CON-03 late closers and idle connections": [
        E2E("many", "test_late_closers_leave_nothing_behind"),
        E2E("many", "test_connections_that_were_idle_still_work"),
    ],
    "CON-04 slow readers": [
        E2E("load", "test_a_slow_reader_holds_its_sender_back_and_nobody_else"),
        E2E("load", "test_a_slow_reader_costs_bounded_memory"),
        E2E("many", "test_readers_that_stop_stop_no_one_else"),
    ],
    "CON-05 many connections between two pods": [
        E2E("load", "test_300_connections_between_two_pods_work_at_the_same_time"),
        E2E("many", "test_a_thousand_connections_share_the_tunnels_to_one_peer"),
        E2E("many", "test_ten_thousand_short_connections_leave_nothing_behind"),
        E2E("ports", "test_what_ztunnel_dials_takes_no_port_of_the_apps_own"),
        E2E("ports", "test_a_destination_out_of_ports_for_a_client_refuses_at_once_and_says_so_on_both_nodes"),
    ],
    "CON-06 servers that speak first": [
        E2E("connection_ends", "test_a_server_speaks_first_within_200_ms"),
        E2E("connection_ends", "test_a_client_that_never_sends_is_served_all_the_same"),
    ],
}


@pytest.mark.parametrize("tests", SCENARIOS.values(), ids=SCENARIOS)
def test_what_holds_a_scenario_is_there(tests: list[str]) -> None:
    for test in tests:
        path, _, name = test.partition("::")
        body = ast.parse((TESTS / path).read_text()).body
        assert name in {one.name for one in body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}, test
