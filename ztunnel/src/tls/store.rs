//! Certificates by identity and the trust bundle.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use tokio::{sync::watch, time::timeout};
use x509_parser::parse_x509_certificate;

use super::{
    ALPN_H2, peer_identity, provider,
    verify::{ExpectIdentity, SameTrustDomain, verify_chain},
};
use crate::identity::Identity;

/// How long a connection waits for the first certificate of its identity and for the first bundle: a pod may be
/// handed over before them, after a start of the agent and ztunnel together.
const ARRIVAL: Duration = Duration::from_secs(5);

/// Material from the agent that cannot be used. What was held before stands.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct Invalid {
    what: String,
    cause: String,
}

/// Why no connection can be authenticated as an identity now.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unusable {
    #[error(
        "no certificate for {0} has arrived: see the agent's log for what the control plane's CA answered"
    )]
    Missing(Identity),
    #[error("the certificate of {0} has expired: check the agent's connection to the control plane")]
    Expired(Identity),
    #[error("the certificate of {0} is not valid yet: check this node's clock")]
    NotYetValid(Identity),
    #[error("no trust bundle has arrived: check the agent's connection to the control plane")]
    NoBundle,
    #[error("the TLS library refused the certificate of {0}: {1}")]
    Library(Identity, String),
}

/// What there is to say of a certificate without its key.
#[derive(Clone, Debug)]
pub struct CertificateInfo {
    pub identity: Identity,
    pub serial: String,
    pub issuer: String,
    pub not_before: u64,
    pub not_after: u64,
}

/// Thread-safe; changed by the agent's frames, read for each tunnel.
#[derive(Debug, Default)]
pub struct Credentials {
    inner: RwLock<Inner>,
    bundle_changes: watch::Sender<()>,
    /// Told of each certificate and each bundle that is taken.
    arrivals: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Inner {
    material: HashMap<Identity, Arc<Material>>,
    roots: Option<Arc<RootCertStore>>,
    /// Built on first use, dropped with the certificate or the bundle that they were built from.
    servers: HashMap<Identity, Arc<ServerConfig>>,
    generation: u64,
}

#[derive(Debug)]
struct Material {
    info: CertificateInfo,
    key: Arc<CertifiedKey>,
    /// Tells tunnels made with an older certificate of the same identity apart.
    generation: u64,
}

// === impl Credentials ===

impl Credentials {
    /// Takes a certificate in place of an older one of the same identity.
    pub fn set_certificate(&self, identity: &str, chain_pem: &[u8], key_pem: &[u8]) -> Result<(), Invalid> {
        let invalid = |cause: String| Invalid { what: format!("certificate of {identity}"), cause };
        let expected: Identity = identity.parse().map_err(|error| invalid(format!("{error}")))?;
        let (info, key) = parse_certificate(&expected, chain_pem, key_pem).map_err(invalid)?;
        let mut inner = self.write();
        inner.generation += 1;
        let generation = inner.generation;
        inner.servers.remove(&expected);
        inner.material.insert(expected, Arc::new(Material { info, key, generation }));
        drop(inner);
        self.arrivals.send_replace(());
        Ok(())
    }

    pub fn remove_certificate(&self, identity: &str) {
        if let Ok(identity) = identity.parse::<Identity>() {
            let mut inner = self.write();
            inner.material.remove(&identity);
            inner.servers.remove(&identity);
        }
    }

    /// Takes a trust bundle in place of the older one.
    pub fn set_bundle(&self, roots_pem: &[u8]) -> Result<(), Invalid> {
        let roots =
            parse_bundle(roots_pem).map_err(|cause| Invalid { what: "trust bundle".to_owned(), cause })?;
        let mut inner = self.write();
        inner.roots = Some(Arc::new(roots));
        inner.servers.clear();
        drop(inner);
        self.bundle_changes.send_replace(());
        self.arrivals.send_replace(());
        Ok(())
    }

    /// Resolves when a certificate of `identity` and a bundle are here, whatever their validity, or after [`ARRIVAL`].
    pub async fn arrived(&self, identity: &Identity) {
        let mut arrivals = self.arrivals.subscribe();
        let arrival = arrivals.wait_for(|()| {
            let inner = self.read();
            inner.roots.is_some() && inner.material.contains_key(identity)
        });
        // What is missing is said by who asks for it then.
        let _ = timeout(ARRIVAL, arrival).await;
    }

    pub fn roots(&self) -> Option<Arc<RootCertStore>> {
        self.read().roots.clone()
    }

    /// Whether a server's chain leads to the bundle that is held now.
    pub fn trusts_server(&self, chain: &[CertificateDer<'_>]) -> bool {
        self.roots().is_some_and(|roots| verify_chain(chain, &roots).is_ok())
    }

    /// Resolves when a change of the bundle leaves a client's chain without a root.
    pub async fn distrusts_client(&self, chain: &[CertificateDer<'_>], trust_domain: &str) {
        let mut changes = self.bundle_changes.subscribe();
        while changes.changed().await.is_ok() {
            let trusted = self.roots().is_some_and(|roots| {
                SameTrustDomain::new(roots, trust_domain).is_ok_and(|verifier| verifier.trusts(chain))
            });
            if !trusted {
                return;
            }
        }
    }

    pub fn list(&self) -> Vec<CertificateInfo> {
        let mut list: Vec<_> = self.read().material.values().map(|m| m.info.clone()).collect();
        list.sort_by(|a, b| a.identity.cmp(&b.identity));
        list
    }

    /// Number of the certificate that `identity` would use now.
    pub fn generation(&self, identity: &Identity) -> Result<u64, Unusable> {
        Ok(self.usable(identity)?.generation)
    }

    /// For a tunnel from `identity` to a peer that must be `expected`.
    pub fn client(&self, identity: &Identity, expected: &Identity) -> Result<(ClientConfig, u64), Unusable> {
        let material = self.usable(identity)?;
        let roots = self.roots().ok_or(Unusable::NoBundle)?;
        let verifier = ExpectIdentity { roots, expected: expected.clone() };
        let mut config = ClientConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| Unusable::Library(identity.clone(), error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&material.key))));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok((config, material.generation))
    }

    /// For tunnels that end at `identity`.
    pub fn server(&self, identity: &Identity) -> Result<Arc<ServerConfig>, Unusable> {
        let material = self.usable(identity)?;
        if let Some(config) = self.read().servers.get(identity) {
            return Ok(Arc::clone(config));
        }
        let mut inner = self.write();
        let roots = inner.roots.clone().ok_or(Unusable::NoBundle)?;
        let library = |error: String| Unusable::Library(identity.clone(), error);
        let verifier = SameTrustDomain::new(roots, &identity.trust_domain).map_err(library)?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| Unusable::Library(identity.clone(), error.to_string()))?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&material.key))));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        let config = Arc::new(config);
        // A newer certificate may have come in between: its config is built by the next caller.
        if inner.material.get(identity).is_some_and(|now| now.generation == material.generation) {
            inner.servers.insert(identity.clone(), Arc::clone(&config));
        }
        Ok(config)
    }

    fn usable(&self, identity: &Identity) -> Result<Arc<Material>, Unusable> {
        let inner = self.read();
        let material = inner.material.get(identity).ok_or_else(|| Unusable::Missing(identity.clone()))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if now < material.info.not_before {
            return Err(Unusable::NotYetValid(identity.clone()));
        }
        if now > material.info.not_after {
            return Err(Unusable::Expired(identity.clone()));
        }
        Ok(Arc::clone(material))
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse_certificate(
    expected: &Identity,
    chain_pem: &[u8],
    key_pem: &[u8],
) -> Result<(CertificateInfo, Arc<CertifiedKey>), String> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain_pem)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("chain: {error}"))?;
    let leaf = chain.first().ok_or("the chain is empty")?;
    let actual = peer_identity(leaf).map_err(|error| error.to_string())?;
    if actual != *expected {
        return Err(format!("the leaf is for {actual}"));
    }
    let info = certificate_info(expected, leaf)?;
    let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|error| format!("private key: {error}"))?;
    let key =
        provider().key_provider.load_private_key(key).map_err(|error| format!("private key: {error}"))?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|error| format!("the key does not fit the leaf: {error}"))?;
    Ok((info, Arc::new(certified)))
}

fn certificate_info(identity: &Identity, leaf: &CertificateDer<'_>) -> Result<CertificateInfo, String> {
    let (_, parsed) = parse_x509_certificate(leaf).map_err(|error| error.to_string())?;
    let validity = parsed.validity();
    Ok(CertificateInfo {
        identity: identity.clone(),
        serial: parsed.raw_serial_as_string(),
        issuer: parsed.issuer().to_string(),
        not_before: u64::try_from(validity.not_before.timestamp()).unwrap_or_default(),
        not_after: u64::try_from(validity.not_after.timestamp()).unwrap_or_default(),
    })
}

fn parse_bundle(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(pem) {
        let root = root.map_err(|error| error.to_string())?;
        roots.add(root).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() {
        return Err("holds no certificate".to_owned());
    }
    Ok(roots)
}
