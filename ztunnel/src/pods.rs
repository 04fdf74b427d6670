//! The pods that this ztunnel serves.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
};

use tokio::{net::TcpListener, sync::watch};

use crate::{
    decide::Source,
    hbone::Pool,
    identity::Identity,
    proto::node::{self, Listener},
    sockets::Netns,
};

/// One pod: who it is, and what is needed to serve it.
#[derive(Debug)]
pub struct Pod {
    pub uid: String,
    pub workload_uid: String,
    pub name: String,
    pub namespace: String,
    pub identity: Identity,
    pub addresses: Vec<IpAddr>,
    pub netns: Netns,
    pub delivery_ports: Vec<PortRange>,
    /// As the agent passed them, kept for handing them to its successor.
    pub listeners: Vec<(Listener, OwnedFd)>,
    pub tunnels: Pool,
    pub inbound_tunnels: Arc<AtomicU32>,
    /// (client, destination) of the plaintext connections that are open: a delivery between the same addresses and
    /// ports would collide with them.
    pub accepted: Arc<Mutex<HashSet<(SocketAddr, SocketAddr)>>>,
    in_transition: AtomicBool,
    stop: watch::Sender<bool>,
    drains: watch::Sender<u32>,
    /// Of this description of the pod alone; what stands above is shared with the next one.
    replaced: watch::Sender<bool>,
}

/// Source ports for deliveries, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    pub low: u16,
    pub high: u16,
}

/// What listens for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Outbound,
    Plaintext,
    Hbone,
}

/// The pods by uid.
#[derive(Debug, Default)]
pub struct Pods {
    by_uid: Mutex<HashMap<String, Arc<Pod>>>,
}

// === impl Role ===

impl From<Listener> for Role {
    fn from(listener: Listener) -> Self {
        match listener {
            Listener::OutboundV4 | Listener::OutboundV6 => Self::Outbound,
            Listener::PlaintextV4 | Listener::PlaintextV6 => Self::Plaintext,
            Listener::HboneV4 | Listener::HboneV6 => Self::Hbone,
        }
    }
}

// === impl PortRange ===

impl PortRange {
    pub fn size(self) -> u32 {
        u32::from(self.high) - u32::from(self.low) + 1
    }
}

impl TryFrom<&node::PortRange> for PortRange {
    type Error = String;

    fn try_from(range: &node::PortRange) -> Result<Self, Self::Error> {
        match (u16::try_from(range.low), u16::try_from(range.high)) {
            (Ok(low), Ok(high)) if low > 0 && low <= high => Ok(Self { low, high }),
            _ => Err(format!("delivery ports {}-{} are no range of ports", range.low, range.high)),
        }
    }
}

// === impl Pod ===

impl Pod {
    /// From the agent's frame and its FDs: the netns, then the listeners.
    ///
    /// # Errors
    /// If the frame is incomplete; says which field.
    pub fn new(add: &node::PodAdd, trust_domain: &str, mut fds: Vec<OwnedFd>) -> Result<Self, String> {
        if fds.len() != add.listeners.len() + 1 {
            return Err(format!("{} FDs came with {} listeners and a netns", fds.len(), add.listeners.len()));
        }
        let sockets = fds.split_off(1);
        let netns = fds.pop().ok_or("no netns FD")?;
        let netns = Netns::new(netns).map_err(|error| format!("netns FD: {error}"))?;
        if netns.inode() != add.netns_inode {
            return Err(format!("the netns FD is {}, netns_inode says {}", netns.inode(), add.netns_inode));
        }
        let addresses: Vec<IpAddr> =
            add.addresses.iter().map(|bytes| crate::state::parse_ip(bytes)).collect::<Result<_, _>>()?;
        if addresses.is_empty() {
            return Err("addresses is empty".to_owned());
        }
        let delivery_ports: Vec<PortRange> =
            add.delivery_ports.iter().map(PortRange::try_from).collect::<Result<_, _>>()?;
        if delivery_ports.is_empty() {
            return Err("delivery_ports is empty: nothing could be delivered to the app".to_owned());
        }
        Ok(Self {
            uid: add.uid.clone(),
            workload_uid: add.workload_uid.clone(),
            name: add.name.clone(),
            namespace: add.namespace.clone(),
            identity: Identity::new(trust_domain, &add.namespace, &add.service_account),
            addresses,
            netns,
            delivery_ports,
            listeners: add.listeners().zip(sockets).collect(),
            tunnels: Pool::default(),
            inbound_tunnels: Arc::default(),
            accepted: Arc::default(),
            in_transition: AtomicBool::new(add.in_transition),
            stop: watch::Sender::new(false),
            drains: watch::Sender::new(0),
            replaced: watch::Sender::new(false),
        })
    }

    /// Whether it is the other pod under a new description: another address or port range, listeners of a family
    /// that was switched on.
    pub fn continues(&self, other: &Self) -> bool {
        self.netns.inode() == other.netns.inode()
            && self.workload_uid == other.workload_uid
            && self.identity == other.identity
    }

    /// Takes over what the pod has open. The older description still has to be [`replaced`](Self::replace).
    pub fn succeed(&mut self, other: &Self) {
        self.tunnels = other.tunnels.clone();
        self.inbound_tunnels = Arc::clone(&other.inbound_tunnels);
        self.accepted = Arc::clone(&other.accepted);
        self.stop = other.stop.clone();
        self.drains = other.drains.clone();
    }

    /// Duplicates of the listeners, ready for accepting.
    pub fn accepting(&self) -> io::Result<Vec<(Role, TcpListener)>> {
        self.listeners
            .iter()
            .map(|(listener, fd)| {
                let socket = std::net::TcpListener::from(fd.try_clone()?);
                socket.set_nonblocking(true)?;
                Ok((Role::from(*listener), TcpListener::from_std(socket)?))
            })
            .collect()
    }

    /// Whether a repeated frame says nothing new.
    pub fn is_same(&self, other: &Self) -> bool {
        let roles = |pod: &Self| pod.listeners.iter().map(|(listener, _)| *listener).collect::<Vec<_>>();
        self.continues(other)
            && self.addresses == other.addresses
            && self.delivery_ports == other.delivery_ports
            && roles(self) == roles(other)
    }

    pub fn source(&self) -> Source<'_> {
        Source { workload_uid: &self.workload_uid, namespace: &self.namespace, addresses: &self.addresses }
    }

    /// Ends the accepting for the pod; what is open has to be cut.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    pub fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// Resolves when the pod is no longer served.
    pub async fn stopped(&self) {
        // Fails only without a sender, and `self` holds it.
        let _ = self.stop.subscribe().wait_for(|stopped| *stopped).await;
    }

    /// Ends the accepting on this description's listeners; what is open goes on.
    pub fn replace(&self) {
        self.replaced.send_replace(true);
    }

    /// Resolves when nothing more is to be accepted on these listeners.
    pub async fn accepts_no_more(&self) {
        let mut replaced = self.replaced.subscribe();
        tokio::select! {
            () = self.stopped() => {}
            // Fails only without a sender, and `self` holds it.
            _ = replaced.wait_for(|replaced| *replaced) => {}
        }
    }

    /// Asks the peers to end their tunnels to the pod. Those that come later end with their last stream.
    pub fn drain(&self) {
        self.drains.send_modify(|drains| *drains = drains.wrapping_add(1));
    }

    /// The pod stays after all.
    pub fn undrain(&self) {
        self.drains.send_if_modified(|drains| std::mem::take(drains) > 0);
    }

    /// Changes with each call of [`Pod::drain`]; 0: never called.
    pub fn drains(&self) -> watch::Receiver<u32> {
        self.drains.subscribe()
    }

    /// Whether peers may not know that it takes tunnels: see `PodAdd.in_transition` of proto/node.proto.
    pub fn in_transition(&self) -> bool {
        self.in_transition.load(Relaxed)
    }

    pub fn set_in_transition(&self, value: bool) {
        self.in_transition.store(value, Relaxed);
    }

    pub fn accepted(&self) -> MutexGuard<'_, HashSet<(SocketAddr, SocketAddr)>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn display_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

// === impl Pods ===

impl Pods {
    pub fn get(&self, uid: &str) -> Option<Arc<Pod>> {
        self.lock().get(uid).cloned()
    }

    /// The newest description of a pod; itself, if it is no longer served.
    pub fn newest(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        self.get(&pod.uid).filter(|newest| newest.continues(pod)).unwrap_or_else(|| Arc::clone(pod))
    }

    /// Returns the pod that had the uid before.
    pub fn insert(&self, pod: Arc<Pod>) -> Option<Arc<Pod>> {
        self.lock().insert(pod.uid.clone(), pod)
    }

    pub fn remove(&self, uid: &str) -> Option<Arc<Pod>> {
        self.lock().remove(uid)
    }

    pub fn list(&self) -> Vec<Arc<Pod>> {
        let mut list: Vec<_> = self.lock().values().cloned().collect();
        list.sort_by(|a, b| a.uid.cmp(&b.uid));
        list
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        self.by_uid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
