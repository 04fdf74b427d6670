//! Verification of peers: a chain to the trust bundle and one SPIFFE id, no host names.

use std::{io, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use super::provider;
use crate::identity::Identity;

/// Why a certificate names no workload, or the wrong one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadPeer {
    #[error("the peer's certificate cannot be parsed: {0}")]
    Unparsable(String),
    #[error("the peer's certificate has {0} URI names, a SPIFFE certificate has exactly one")]
    NotOneUri(usize),
    #[error("the peer's certificate: {0}")]
    NoIdentity(String),
    #[error("the peer is {actual}, expected {expected}")]
    Unexpected { actual: String, expected: String },
    #[error("the peer {actual} is of a foreign trust domain, ours is {ours}")]
    ForeignTrustDomain { actual: String, ours: String },
}

/// Client side: the server must be exactly `expected`.
#[derive(Debug)]
pub struct ExpectIdentity {
    pub roots: Arc<RootCertStore>,
    pub expected: Identity,
}

/// Server side: any identity of our trust domain.
#[derive(Debug)]
pub struct SameTrustDomain {
    inner: Arc<dyn ClientCertVerifier>,
    trust_domain: String,
}

/// The SPIFFE id of a certificate. It must hold exactly one URI name (SPIFFE X.509-SVID, section 2).
pub fn peer_identity(certificate: &CertificateDer<'_>) -> Result<Identity, BadPeer> {
    let (_, parsed) =
        parse_x509_certificate(certificate).map_err(|error| BadPeer::Unparsable(error.to_string()))?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| BadPeer::Unparsable(error.to_string()))?
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => uri
            .parse()
            .map_err(|error: crate::identity::InvalidIdentity| BadPeer::NoIdentity(error.to_string())),
        _ => Err(BadPeer::NotOneUri(uris.len())),
    }
}

/// Whether a chain (leaf first) leads to one of `roots` now.
pub fn verify_chain(chain: &[CertificateDer<'_>], roots: &RootCertStore) -> Result<(), Error> {
    let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
    let leaf = ParsedCertificate::try_from(leaf)?;
    let algorithms = provider().signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&leaf, roots, intermediates, UnixTime::now(), algorithms)
}

/// A failed handshake in words: our own reason for refusing a peer, if that is the cause.
pub fn describe(error: &io::Error) -> String {
    let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match cause {
        Some(Error::InvalidCertificate(CertificateError::Other(OtherError(ours)))) => ours.to_string(),
        _ => error.to_string(),
    }
}

fn refused(error: BadPeer) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

fn tls12_refused() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
}

// === impl ExpectIdentity ===

impl ServerCertVerifier for ExpectIdentity {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let leaf = ParsedCertificate::try_from(end_entity)?;
        let algorithms = provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&leaf, &self.roots, intermediates, now, algorithms)?;
        let actual = peer_identity(end_entity).map_err(refused)?;
        if actual != self.expected {
            let (actual, expected) = (actual.to_string(), self.expected.to_string());
            return Err(refused(BadPeer::Unexpected { actual, expected }));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls12_refused()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

// === impl SameTrustDomain ===

impl SameTrustDomain {
    pub fn new(roots: Arc<RootCertStore>, trust_domain: &str) -> Result<Self, String> {
        let inner = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(provider()))
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self { inner, trust_domain: trust_domain.to_owned() })
    }

    /// Whether a client with this chain would be let in now.
    pub fn trusts(&self, chain: &[CertificateDer<'_>]) -> bool {
        chain
            .split_first()
            .is_some_and(|(leaf, rest)| self.verify_client_cert(leaf, rest, UnixTime::now()).is_ok())
    }
}

impl ClientCertVerifier for SameTrustDomain {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        let actual = peer_identity(end_entity).map_err(refused)?;
        if actual.trust_domain != self.trust_domain {
            let (actual, ours) = (actual.to_string(), self.trust_domain.clone());
            return Err(refused(BadPeer::ForeignTrustDomain { actual, ours }));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls12_refused()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
