//! The commands of the CNI spec: ADD, DEL, CHECK, GC, STATUS, VERSION.

use std::os::fd::{AsFd as _, OwnedFd};

use serde_json::json;

use crate::{
    agent::{self, NoAnswer},
    config::{self, Config, VERSIONS},
    error::{CniError, Code},
    parameters::{self, Attachment, Environment, Pod},
    proto::{CniAnswer, CniRequest, cni_request::Command},
    state,
};

/// Carries out CNI_COMMAND; the answer is what goes to standard output.
///
/// # Errors
/// Bad input, and for ADD and CHECK also a pod that cannot be enrolled.
pub fn run(input: &[u8], environment: impl Environment) -> Result<String, CniError> {
    match parameters::command(&environment)?.as_str() {
        "ADD" => add(input, &environment),
        "CHECK" => check(input, &environment),
        "DEL" => delete(input, &environment),
        // The agent compares its pods with the kernel and the API server all the time: nothing is left to collect.
        "GC" => Config::parse(input).map(|_| String::new()),
        // Not ready would keep every pod of the node from starting, but without the agent the plain ones may.
        "STATUS" => Config::parse(input).map(|_| String::new()),
        "VERSION" => version(input),
        other => Err(CniError::new(
            Code::InvalidEnvironment,
            format!("CNI_COMMAND is {other:?}"),
            "it must be ADD, DEL, CHECK, GC, STATUS or VERSION",
        )),
    }
}

fn add(input: &[u8], environment: &impl Environment) -> Result<String, CniError> {
    let config = Config::parse(input)?;
    let Some(previous) = &config.previous else {
        return Err(CniError::new(
            Code::InvalidConfig,
            "bad configuration: prevResult is missing",
            "undermesh-cni must stand in a list after the plugin that makes the pod's interface",
        ));
    };
    enrolled(Command::Add, &config, environment)?;
    Ok(previous.get().to_owned())
}

fn check(input: &[u8], environment: &impl Environment) -> Result<String, CniError> {
    enrolled(Command::Check, &Config::parse(input)?, environment)?;
    Ok(String::new())
}

/// The agent has said that the pod is as it should be; if it is away, that the pod may be without it.
fn enrolled(command: Command, config: &Config, environment: &impl Environment) -> Result<(), CniError> {
    let attachment = Attachment::read(environment)?;
    attachment.require_pod()?;
    let netns = parameters::open_netns(environment)?;
    let pod = attachment.pod.clone();
    let addresses = config.addresses()?;
    let netns = (command == Command::Add).then_some(netns);
    match ask(command, config, attachment, addresses, netns) {
        Ok(answer) if answer.error.is_empty() => Ok(()),
        Ok(answer) => Err(refused(&pod, &answer)),
        Err(no_answer) => match state::may_start(&config.state_file, &pod.namespace) {
            Ok(()) => {
                eprintln!("undermesh-cni: pod {pod} starts outside the mesh: {no_answer}");
                Ok(())
            }
            Err(wait) => Err(CniError::new(
                Code::TryAgainLater,
                format!("pod {pod} cannot start before the undermesh agent of this node answers"),
                format!(
                    "{no_answer}; {wait}. The kubelet tries again; if this goes on look at the agent: \
                     kubectl -n undermesh-system get pods -o wide"
                ),
            )),
        },
    }
}

fn refused(pod: &Pod, answer: &CniAnswer) -> CniError {
    let (code, next) = if answer.retry {
        (Code::TryAgainLater, "the kubelet tries again")
    } else {
        (Code::Refused, "mend the cause, or take the pod out of the mesh by label undermesh.io/mesh=disabled")
    };
    let details = format!("the agent says: {}; {next}", answer.error);
    CniError::new(code, format!("pod {pod} could not be enrolled"), details)
}

/// Without the agent there is nothing to release: it finds out at its start which pods are gone.
fn delete(input: &[u8], environment: &impl Environment) -> Result<String, CniError> {
    let config = Config::parse(input)?;
    let attachment = Attachment::read(environment)?;
    let pod = attachment.pod.clone();
    match ask(Command::Del, &config, attachment, Vec::new(), None) {
        Ok(answer) if answer.error.is_empty() => {}
        Ok(answer) if answer.retry => {
            return Err(CniError::new(
                Code::TryAgainLater,
                format!("pod {pod} could not be released"),
                format!("the agent says: {}; the kubelet tries again", answer.error),
            ));
        }
        Ok(answer) => eprintln!("undermesh-cni: deleting pod {pod}: the agent says: {}", answer.error),
        Err(no_answer) => eprintln!("undermesh-cni: deleting pod {pod}: {no_answer}"),
    }
    Ok(String::new())
}

fn ask(
    command: Command,
    config: &Config,
    attachment: Attachment,
    addresses: Vec<String>,
    netns: Option<OwnedFd>,
) -> Result<CniAnswer, NoAnswer> {
    let Attachment { container_id, interface, pod } = attachment;
    let request = CniRequest {
        command: command.into(),
        container_id,
        interface,
        pod_namespace: pod.namespace,
        pod_name: pod.name,
        pod_uid: pod.uid,
        addresses,
    };
    agent::ask(&config.socket, &request, netns.as_ref().map(|fd| fd.as_fd()), config.timeout)
}

fn version(input: &[u8]) -> Result<String, CniError> {
    let requested = config::requested_version(input)?;
    Ok(json!({ "cniVersion": requested, "supportedVersions": VERSIONS }).to_string())
}
