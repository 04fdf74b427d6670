//! The real plugin against a small agent on a Unix socket.

mod support;

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use support::{Agent, Node, Reply, netns_inode};

const PREVIOUS: &str = r#"{ "cniVersion":"1.1.0", "interfaces":[{"name":"eth0","sandbox":"/proc/1/ns/net"}],
  "ips":[{"address":"10.244.1.7/24","interface":0},{"address":"fd00::7/64"}], "dns":{}, "x":1.50 }"#;

#[test]
fn add_hands_the_pod_and_its_netns_to_the_agent_and_prints_the_previous_result_unchanged() {
    let node = Node::new();
    let agent = Agent::start(&node, Reply::done());
    let outcome = node.plugin("ADD").run(&node.config(PREVIOUS));
    assert_eq!(outcome.stdout, PREVIOUS);
    assert!(outcome.success, "{outcome:?}");

    let (request, netns) = agent.request();
    assert_eq!(request.command, 0);
    assert_eq!(request.container_id, "container-1");
    assert_eq!(request.interface, "eth0");
    assert_eq!((&*request.pod_namespace, &*request.pod_name, &*request.pod_uid), ("shop", "web-0", "uid-1"));
    assert_eq!(request.addresses, ["10.244.1.7", "fd00::7"]);
    let received = fs::File::from(netns.expect("an FD")).metadata().expect("stat");
    assert_eq!(received.ino(), netns_inode(), "the FD is the netns of CNI_NETNS");
}

#[test]
fn every_supported_version_is_spoken() {
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let node = Node::new();
        let _agent = Agent::start(&node, Reply::done());
        let config = node.config(PREVIOUS).replacen("1.1.0", version, 1);
        let outcome = node.plugin("ADD").run(&config);
        assert!(outcome.success, "{version}: {outcome:?}");
    }
}

#[test]
fn an_answer_in_pieces_is_put_together() {
    let node = Node::new();
    let _agent = Agent::start(&node, Reply::in_pieces("no route table is free", true));
    let outcome = node.plugin("ADD").run(&node.config(PREVIOUS));
    assert!(outcome.error()["details"].as_str().expect("details").contains("no route table is free"));
}

#[test]
fn what_the_agent_refuses_fails_and_says_why() {
    for (retry, code) in [(true, 11), (false, 100)] {
        let node = Node::new();
        node.enrol("bank\n");
        let _agent = Agent::start(&node, Reply::error("another mesh has this pod", retry));
        let outcome = node.plugin("ADD").run(&node.config(PREVIOUS));
        let error = outcome.error();
        assert_eq!(error["code"], code);
        assert_eq!(error["cniVersion"], "1.1.0");
        assert!(error["msg"].as_str().expect("msg").contains("shop/web-0"), "{error}");
        assert!(error["details"].as_str().expect("details").contains("another mesh has this pod"), "{error}");
    }
}

#[test]
fn check_asks_the_agent_and_prints_nothing() {
    let node = Node::new();
    let agent = Agent::start(&node, Reply::done());
    let outcome = node.plugin("CHECK").run(&node.config(PREVIOUS));
    assert!(outcome.success && outcome.stdout.is_empty(), "{outcome:?}");
    let (request, netns) = agent.request();
    assert_eq!((request.command, &*request.pod_uid), (2, "uid-1"));
    assert!(netns.is_none(), "only ADD carries one");

    let node = Node::new();
    let _agent = Agent::start(&node, Reply::error("the rule is missing", false));
    assert_eq!(node.plugin("CHECK").run(&node.config(PREVIOUS)).error()["code"], 100);
}

#[test]
fn del_tells_the_agent_without_a_netns() {
    let node = Node::new();
    let agent = Agent::start(&node, Reply::done());
    let outcome = node.plugin("DEL").without("CNI_NETNS").run(&node.config("null"));
    assert!(outcome.success && outcome.stdout.is_empty(), "{outcome:?}");
    let (request, netns) = agent.request();
    assert_eq!((request.command, &*request.container_id), (1, "container-1"));
    assert!(netns.is_none());
}

#[test]
fn del_fails_only_when_the_agent_wants_it_again() {
    let rows = [
        (Some(Reply::done()), true),
        (Some(Reply::error("unknown container", false)), true),
        (Some(Reply::error("busy", true)), false),
        (Some(Reply::Garbage), true),
        (Some(Reply::Close), true),
        (Some(Reply::Silence), true),
        (None, true),
    ];
    for (reply, expected) in rows {
        let node = Node::new();
        node.enrol("shop\n");
        let name = format!("{reply:?}");
        let _agent = reply.map(|reply| Agent::start(&node, reply));
        let outcome = node.plugin("DEL").run(&node.config_with(PREVIOUS, json!({ "timeout_seconds": 1 })));
        assert_eq!(outcome.success, expected, "{name}: {outcome:?}");
    }
}

/// The agent is away in every way that there is, each with the same three answers.
#[test]
fn without_the_agent_the_list_of_enrolled_namespaces_decides() {
    let lists = [
        (Some("bank\nshop\n"), "shop", false),
        (Some("bank\n"), "shop", true),
        (Some(""), "shop", true),
        (Some("kube-system\n"), "kube-system", false),
        (None, "shop", false),
        (None, "kube-system", true),
        (None, "undermesh-system", true),
        (Some("bank\n\0\0"), "shop", false),
    ];
    let away = || [None, Some(Reply::Close), Some(Reply::Garbage), Some(Reply::Huge), Some(Reply::Unbound)];
    for (list, namespace, starts) in lists {
        for reply in away() {
            let node = Node::new();
            if let Some(list) = list {
                node.enrol(list);
            }
            let name = format!("{list:?} {namespace} {reply:?}");
            let _agent = reply.map(|reply| Agent::start(&node, reply));
            let outcome = node.plugin("ADD").pod(namespace, "web-0").run(&node.config(PREVIOUS));
            if starts {
                assert_eq!((outcome.success, &*outcome.stdout), (true, PREVIOUS), "{name}");
                assert!(outcome.stderr.contains("outside the mesh"), "{name}: {outcome:?}");
            } else {
                let error = outcome.error();
                assert_eq!(error["code"], 11, "{name}");
                assert!(error["msg"].as_str().expect("msg").contains(namespace), "{name}: {error}");
            }
        }
    }
}

#[test]
fn an_agent_that_hangs_is_left_at_the_deadline() {
    for (reply, list, starts) in
        [(Reply::Silence, "shop\n", false), (Reply::Silence, "bank\n", true), (Reply::Drip, "shop\n", false)]
    {
        let node = Node::new();
        node.enrol(list);
        let name = format!("{reply:?} {list:?}");
        let _agent = Agent::start(&node, reply);
        let config = node.config_with(PREVIOUS, json!({ "timeout_seconds": 1 }));
        let start = Instant::now();
        let outcome = node.plugin("ADD").run(&config);
        let took = start.elapsed();
        assert_eq!(outcome.success, starts, "{name}: {outcome:?}");
        assert!(took >= Duration::from_millis(900) && took < Duration::from_secs(4), "{name}: {took:?}");
        if !starts {
            let error = outcome.error();
            assert!(error["details"].as_str().expect("details").contains("longer than 1 s"), "{error}");
        }
    }
}

#[test]
fn a_full_backlog_cannot_hold_the_plugin_beyond_the_deadline() {
    let node = Node::new();
    node.enrol("shop\n");
    let _full = support::full_backlog(&node);
    let start = Instant::now();
    let config = node.config_with(PREVIOUS, json!({ "timeout_seconds": 1 }));
    assert_eq!(node.plugin("ADD").run(&config).error()["code"], 11);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn version_answers_with_what_is_supported() {
    let supported = json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    for (input, version) in [(r#"{"cniVersion":"1.0.0"}"#, "1.0.0"), ("", "1.1.0"), ("{}", "1.1.0")] {
        let outcome = Node::new().plugin("VERSION").run(input);
        assert!(outcome.success, "{outcome:?}");
        let answer: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        assert_eq!(answer, json!({ "cniVersion": version, "supportedVersions": supported }));
    }
}

#[test]
fn status_and_gc_need_no_agent() {
    for command in ["STATUS", "GC"] {
        let node = Node::new();
        let outcome =
            node.plugin(command).without("CNI_CONTAINERID").without("CNI_NETNS").run(&node.config("null"));
        assert!(outcome.success && outcome.stdout.is_empty(), "{command}: {outcome:?}");
        assert_eq!(node.plugin(command).run("{").error()["code"], 6, "{command}");
    }
}

#[test]
fn input_that_makes_no_sense_is_an_error_that_names_it() {
    let with = |fields: Value| Node::new().config_with(PREVIOUS, fields);
    let rows = [
        (String::new(), 6, "standard input"),
        ("{".to_owned(), 6, "standard input"),
        ("[]".to_owned(), 6, "standard input"),
        ("\u{0}".to_owned(), 6, "standard input"),
        ("{}".to_owned(), 7, "cniVersion"),
        (with(json!({ "cniVersion": 1 })), 7, "cniVersion"),
        (with(json!({ "cniVersion": "0.2.0" })), 1, "0.2.0"),
        (with(json!({ "cniVersion": "2.0.0" })), 1, "2.0.0"),
        (with(json!({ "socket": "run/cni.sock" })), 7, "run/cni.sock"),
        (with(json!({ "socket": ["x"] })), 7, "socket"),
        (with(json!({ "state_file": "" })), 7, "state_file"),
        (with(json!({ "timeout_seconds": 0 })), 7, "timeout_seconds"),
        (with(json!({ "timeout_seconds": 11 })), 7, "timeout_seconds"),
        (with(json!({ "timeout_seconds": "1" })), 7, "timeout_seconds"),
        (Node::new().config("null"), 7, "prevResult"),
        (Node::new().config("[]"), 7, "prevResult"),
        (Node::new().config(r#"{"ips":{}}"#), 7, "prevResult.ips"),
        (Node::new().config(r#"{"ips":[{"address":7}]}"#), 7, "prevResult.ips"),
    ];
    for (input, code, named) in rows {
        let error = Node::new().plugin("ADD").run(&input).error();
        assert_eq!(error["code"], code, "{input}: {error}");
        assert!(error["msg"].as_str().expect("msg").contains(named), "{input}: {error}");
        assert!(!error["details"].as_str().expect("details").is_empty(), "{input}");
    }
}

#[test]
fn an_environment_that_makes_no_sense_is_an_error_that_names_it() {
    let rows = [
        ("CNI_COMMAND", None, 4, "CNI_COMMAND"),
        ("CNI_COMMAND", Some("ADDD"), 4, "ADDD"),
        ("CNI_CONTAINERID", None, 4, "CNI_CONTAINERID"),
        ("CNI_CONTAINERID", Some(""), 4, "CNI_CONTAINERID"),
        ("CNI_IFNAME", None, 4, "CNI_IFNAME"),
        ("CNI_NETNS", None, 4, "CNI_NETNS"),
        ("CNI_NETNS", Some("/proc/self/ns/missing"), 5, "/proc/self/ns/missing"),
        ("CNI_NETNS", Some("/dev/null"), 5, "/dev/null"),
        ("CNI_ARGS", None, 4, "container-1"),
        ("CNI_ARGS", Some("K8S_POD_NAMESPACE=shop"), 4, "container-1"),
    ];
    for (name, value, code, named) in rows {
        let node = Node::new();
        node.enrol("");
        let plugin = node.plugin("ADD");
        let plugin = match value {
            Some(value) => plugin.with(name, value),
            None => plugin.without(name),
        };
        let error = plugin.run(&node.config(PREVIOUS)).error();
        assert_eq!(error["code"], code, "{name}={value:?}: {error}");
        assert!(error["msg"].as_str().expect("msg").contains(named), "{name}={value:?}: {error}");
    }
}

#[test]
fn errors_carry_a_version_that_the_runtime_reads() {
    let node = Node::new();
    let config = node.config(PREVIOUS).replacen("1.1.0", "0.4.0", 1);
    assert_eq!(node.plugin("ADD").run(&config).error()["cniVersion"], "0.4.0");
    assert_eq!(node.plugin("ADD").run("{").error()["cniVersion"], "1.1.0");
}
