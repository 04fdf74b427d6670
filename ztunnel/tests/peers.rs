//! What strangers and foreign HBONE clients get from the tunnel port: reference tables of Istio's ztunnel, 5.6.

mod support;

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode, Uri, Version};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    version::TLS13,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use support::{APP_PORT, HBONE_PORT, Node, WAIT, ca::Authority, ca::Issued, hostname, identity, two_pods};

/// A client that trusts anyone: what is tested is whether the server trusts it.
#[derive(Debug)]
struct Trusting(Arc<CryptoProvider>);

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

struct Hello<'a> {
    certificate: Option<&'a Issued>,
    alpn: &'static [u8],
    provider: CryptoProvider,
}

impl<'a> Hello<'a> {
    fn of(issued: &'a Issued) -> Self {
        let kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519];
        let provider = CryptoProvider { kx_groups, ..aws_lc_rs::default_provider() };
        Self { certificate: Some(issued), alpn: b"h2", provider }
    }

    /// The handshake, and a round trip after it: in TLS 1.3 a server's refusal comes with the first read.
    async fn tls(self, node: &Node) -> io::Result<TlsStream<TcpStream>> {
        let provider = Arc::new(self.provider);
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Trusting(provider)));
        let mut config = match self.certificate {
            Some(issued) => {
                let chain = CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes());
                let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain.collect::<Result<_, _>>().unwrap(), key).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![self.alpn.to_vec()];
        let tcp = TcpStream::connect(node.socket(2, HBONE_PORT)).await?;
        let name = ServerName::try_from("unused.invalid").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, tcp).await
    }

    async fn h2(self, node: &Node) -> Result<SendRequest<Bytes>, String> {
        let tls = self.tls(node).await.map_err(|error| error.to_string())?;
        let (requests, connection) = h2::client::handshake(tls).await.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        Ok(requests)
    }
}

async fn ask(
    requests: &SendRequest<Bytes>,
    method: Method,
    authority: &str,
) -> Result<StatusCode, h2::Error> {
    let uri = match method {
        Method::CONNECT => Uri::builder().authority(authority).build().unwrap(),
        _ => format!("http://{authority}/").parse().unwrap(),
    };
    let request = Request::builder().method(method).uri(uri).version(Version::HTTP_2).body(()).unwrap();
    let mut requests = requests.clone().ready().await?;
    let (response, _stream) = requests.send_request(request, false)?;
    Ok(timeout(WAIT, response).await.expect("no response")?.status())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_answered_as_istio_answers_them() {
    let (node, app) = two_pods().await;
    let issued = node.ca.issue(&identity("client"));
    let requests = Hello::of(&issued).h2(&node).await.unwrap();
    let accept = tokio::spawn(async move {
        loop {
            drop(app.accept().await);
        }
    });
    let ours = node.socket(2, APP_PORT).to_string();
    let host = hostname("web");
    let rows = [
        (Method::CONNECT, ours.clone(), 200),
        (Method::CONNECT, format!("{host}:8000"), 200),
        (Method::CONNECT, format!("{host}:9999"), 400),
        (Method::CONNECT, "unknown.example.com:80".to_owned(), 400),
        (Method::GET, ours.clone(), 400),
        (Method::POST, ours, 400),
        // Another pod's address, a service's, the tunnel's own port; nobody listens at 1 and 15001, which is the app's.
        (Method::CONNECT, node.socket(1, APP_PORT).to_string(), 400),
        (Method::CONNECT, node.socket(100, 8000).to_string(), 400),
        (Method::CONNECT, "127.0.0.1:8080".to_owned(), 400),
        (Method::CONNECT, "[fd00::2]:8080".to_owned(), 400),
        (Method::CONNECT, node.socket(2, 15001).to_string(), 503),
        (Method::CONNECT, node.socket(2, HBONE_PORT).to_string(), 400),
        (Method::CONNECT, node.address(2).to_string(), 400),
        (Method::CONNECT, node.socket(2, 1).to_string(), 503),
    ];
    for (method, authority, expected) in rows {
        let status = ask(&requests, method.clone(), &authority).await.unwrap();
        assert_eq!(status, expected, "{method} {authority}");
    }
    accept.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_certificates_of_our_trust_domain_get_in() {
    let (node, _app) = two_pods().await;
    let stranger = Authority::new("stranger");
    let client = identity("client");
    let foreign = "spiffe://other.domain/ns/shop/sa/client";
    let rows = [
        ("valid", Some(node.ca.issue(&client)), true),
        ("none", None, false),
        ("another root", Some(stranger.issue(&client)), false),
        ("another trust domain", Some(node.ca.issue(foreign)), false),
        ("expired", Some(node.ca.issue_for(&[&client], -100, -10)), false),
        ("not valid yet", Some(node.ca.issue_for(&[&client], 600, 900)), false),
        ("no SPIFFE id", Some(node.ca.issue("https://cluster.local/ns/shop/sa/client")), false),
        ("two ids", Some(node.ca.issue_for(&[&client, &identity("server")], -10, 900)), false),
        ("no URI", Some(node.ca.issue_for(&[], -10, 900)), false),
    ];
    for (name, issued, let_in) in rows {
        let authority = node.socket(2, APP_PORT).to_string();
        let placeholder = node.ca.issue(&client);
        let hello = Hello { certificate: issued.as_ref(), ..Hello::of(&placeholder) };
        let outcome = match hello.h2(&node).await {
            Ok(requests) => {
                ask(&requests, Method::CONNECT, &authority).await.map_err(|error| error.to_string())
            }
            Err(error) => Err(error),
        };
        assert_eq!(outcome.is_ok(), let_in, "{name}: {outcome:?}");
    }
}

/// TLS 1.2 is not even compiled in.
#[tokio::test(flavor = "multi_thread")]
async fn only_tls_1_3_with_aes_gcm_and_h2_is_spoken() {
    let (node, _app) = two_pods().await;
    let issued = node.ca.issue(&identity("client"));

    let mut tls = Hello::of(&issued).tls(&node).await.unwrap();
    let session = tls.get_ref().1;
    assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]));
    let group = session.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    let suite = session.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_256_GCM_SHA384);
    // No ticket to resume with ever comes.
    assert_eq!(session.tls13_tickets_received(), 0);
    let mut settings = [0; 9];
    tls.read_exact(&mut settings).await.unwrap();
    assert_eq!(tls.get_ref().1.tls13_tickets_received(), 0);

    let only_chacha = CryptoProvider {
        cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256],
        ..aws_lc_rs::default_provider()
    };
    for (name, hello) in [
        ("ALPN http/1.1", Hello { alpn: b"http/1.1", ..Hello::of(&issued) }),
        ("ChaCha20", Hello { provider: only_chacha, ..Hello::of(&issued) }),
    ] {
        assert!(hello.tls(&node).await.is_err(), "{name} was accepted");
    }
    for group in [aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1] {
        let provider = CryptoProvider { kx_groups: vec![group], ..aws_lc_rs::default_provider() };
        assert!(Hello { provider, ..Hello::of(&issued) }.tls(&node).await.is_ok(), "{group:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_bytes_on_the_tunnel_port_end_only_their_own_connection() {
    let (node, app) = two_pods().await;
    let good = support::connection(&node, &app).await;
    for noise in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0; 100],
        &[0x16, 3, 1, 0xff, 0xff],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(node.socket(2, HBONE_PORT)).await.unwrap();
        stream.write_all(noise).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _ = timeout(Duration::from_secs(2), stream.read_to_end(&mut rest)).await.expect("kept open");
    }
    let issued = node.ca.issue(&identity("client"));
    let mut tls = Hello::of(&issued).tls(&node).await.unwrap();
    tls.write_all(&[0xff; 200]).await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(Duration::from_secs(2), tls.read_to_end(&mut rest)).await.expect("kept open");
    let (mut client, mut server) = good;
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0; 1]).await.unwrap();
}
