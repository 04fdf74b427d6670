//! The CONNECT request: its authority and headers.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use http::{HeaderMap, Method, Request, Uri, header::HeaderValue};

use crate::{
    identity::Identity,
    state::{Service, Workload},
};

/// The caller's identity, in a waypoint's own CONNECTs.
const CALLER: &str = "undermesh-caller";
/// Longest authority: a DNS name, a colon and a port.
const MAX_AUTHORITY: usize = 255 + 6;

/// Where a peer wants to be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    Address(SocketAddr),
    Host(String, u16),
}

/// The trace that the logs of both sides share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// 32 hexadecimal digits.
    pub id: String,
}

/// Why an authority is not of the form IP:PORT, [IPV6]:PORT or HOST:PORT.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the authority is not of the form HOST:PORT: {0}")]
pub struct InvalidAuthority(&'static str);

/// A CONNECT for `authority` with the headers that tell who asks.
pub fn connect(
    authority: SocketAddr,
    source: SocketAddr,
    service: Option<&Service>,
    baggage: Option<String>,
    trace: &Trace,
) -> Result<Request<()>, http::Error> {
    let uri = Uri::builder().authority(authority.to_string()).build()?;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(uri)
        .version(http::Version::HTTP_2)
        .header("forwarded", forwarded(source, service))
        .header("traceparent", trace.header());
    if let Some(baggage) = baggage {
        request = request.header("baggage", baggage);
    }
    request.body(())
}

/// RFC 7239; Istio's peers read the host for their telemetry.
fn forwarded(source: SocketAddr, service: Option<&Service>) -> String {
    match service {
        Some(service) => format!("for=\"{source}\";host={}", service.hostname),
        None => format!("for=\"{source}\""),
    }
}

/// What a workload tells of itself for its peers' telemetry.
pub fn baggage(workload: &Workload, cluster: &str) -> String {
    let cluster = if workload.cluster_id.is_empty() { cluster } else { &workload.cluster_id };
    let pairs = [
        ("k8s.cluster.name", cluster),
        ("k8s.namespace.name", &workload.namespace),
        ("k8s.deployment.name", &workload.workload_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
        ("cloud.region", &workload.locality.region),
        ("cloud.availability_zone", &workload.locality.zone),
    ];
    let pairs = pairs.iter().filter(|(_, value)| !value.is_empty() && HeaderValue::from_str(value).is_ok());
    pairs.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// The host of a `Forwarded` header, if it has one: the first, where several proxies have written.
pub fn forwarded_host(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get("forwarded")?.to_str().ok()?;
    let host = value.split([';', ',']).find_map(|part| part.trim().strip_prefix("host="))?;
    Some(host.trim_matches('"')).filter(|host| !host.is_empty())
}

/// Whom a waypoint says it speaks for. Whether to believe it is for others to say.
pub fn caller(headers: &HeaderMap) -> Option<Identity> {
    let mut values = headers.get_all(CALLER).iter();
    let value = values.next()?;
    // Two would leave open which one policy is to judge.
    if values.next().is_some() {
        return None;
    }
    value.to_str().ok()?.parse().ok()
}

// === impl Trace ===

impl Trace {
    pub fn random() -> Self {
        Self { id: format!("{:032x}", fastrand::u128(1..)) }
    }

    /// The peer's trace (W3C traceparent, version 00), or a new one.
    pub fn of(headers: &HeaderMap) -> Self {
        let parse = || {
            let value = headers.get("traceparent")?.to_str().ok()?;
            let id = value.strip_prefix("00-")?.get(..32)?;
            let valid = id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            (valid && id.bytes().any(|b| b != b'0')).then(|| Self { id: id.to_owned() })
        };
        parse().unwrap_or_else(Self::random)
    }

    fn header(&self) -> String {
        format!("00-{}-{:016x}-01", self.id, fastrand::u64(1..))
    }
}

// === impl Authority ===

impl FromStr for Authority {
    type Err = InvalidAuthority;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        if value.len() > MAX_AUTHORITY {
            return Err(InvalidAuthority("too long"));
        }
        let (host, port) = value.rsplit_once(':').ok_or(InvalidAuthority("no port"))?;
        if port.is_empty() || port.len() > 5 || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(InvalidAuthority("bad port"));
        }
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(InvalidAuthority("bad port"))?;
        if let Some(bracketed) = host.strip_prefix('[') {
            let address = bracketed.strip_suffix(']').ok_or(InvalidAuthority("unbalanced brackets"))?;
            let address = address.parse().map_err(|_| InvalidAuthority("bad IPv6 address"))?;
            return Ok(Self::Address(SocketAddr::new(IpAddr::V6(address), port)));
        }
        if let Ok(address) = host.parse() {
            return Ok(Self::Address(SocketAddr::new(IpAddr::V4(address), port)));
        }
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if host.is_empty() || !host.bytes().all(valid) {
            return Err(InvalidAuthority("bad host"));
        }
        Ok(Self::Host(host.to_ascii_lowercase(), port))
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::header::{FORWARDED, HeaderName};
    use proptest::prelude::*;

    use super::*;

    const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

    #[test]
    fn authorities_are_an_address_or_a_host_with_a_port() {
        let address = |text: &str| Some(Authority::Address(text.parse().unwrap()));
        let rows = [
            ("10.0.0.2:8080", address("10.0.0.2:8080")),
            ("[::1]:80", address("[::1]:80")),
            ("[fd00::2]:65535", address("[fd00::2]:65535")),
            (
                "web.shop.svc.cluster.local:80",
                Some(Authority::Host("web.shop.svc.cluster.local".to_owned(), 80)),
            ),
            ("WEB:80", Some(Authority::Host("web".to_owned(), 80))),
            ("10.0.0.2", None),
            ("10.0.0.2:", None),
            ("10.0.0.2:0", None),
            ("10.0.0.2:65536", None),
            ("10.0.0.2:+80", None),
            ("10.0.0.2:80:80", None),
            ("::1:80", None),
            ("[::1:80", None),
            ("[10.0.0.2]:80", None),
            (":80", None),
            ("user@web:80", None),
            ("web/x:80", None),
            ("", None),
        ];
        for (text, expected) in rows {
            assert_eq!(text.parse::<Authority>().ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn the_forwarded_header_quotes_the_client_and_names_the_service() {
        let service = Service { hostname: "example.com".to_owned(), ..Service::default() };
        let rows = [
            ("127.0.0.1:80", None, "for=\"127.0.0.1:80\""),
            ("[::1]:80", None, "for=\"[::1]:80\""),
            ("127.0.0.1:80", Some(&service), "for=\"127.0.0.1:80\";host=example.com"),
        ];
        for (source, service, expected) in rows {
            assert_eq!(forwarded(source.parse().unwrap(), service), expected);
        }
    }

    #[test]
    fn the_request_is_a_plain_connect() {
        let trace = Trace::random();
        let authority = "[fd00::2]:8080".parse().unwrap();
        let request = connect(authority, "[fd00::1]:4000".parse().unwrap(), None, None, &trace).unwrap();
        assert_eq!(request.uri().authority().unwrap(), "[fd00::2]:8080");
        assert!(request.uri().scheme().is_none() && request.uri().path_and_query().is_none());
        assert_eq!(Trace::of(request.headers()), trace);
    }

    #[test]
    fn a_traceparent_that_is_no_trace_is_replaced() {
        for value in ["", "00-", "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "00-zz"] {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", value.parse().unwrap());
            assert_eq!(Trace::of(&headers).id.len(), 32);
        }
    }

    #[test]
    fn the_host_is_found_among_what_proxies_write() {
        let rows = [
            ("for=\"10.0.0.1:80\";host=a.example", Some("a.example")),
            ("host=\"a.example\"; for=unknown", Some("a.example")),
            ("for=\"[::1]:80\";host=a.example, for=10.0.0.2;host=b.example", Some("a.example")),
            ("for=10.0.0.1", None),
            ("host=", None),
            ("", None),
        ];
        for (value, expected) in rows {
            let headers = HeaderMap::from_iter([(FORWARDED, value.parse().unwrap())]);
            assert_eq!(forwarded_host(&headers), expected, "{value:?}");
        }
    }

    // What a peer may send, whatever it is, is taken or refused. `make fuzz` tries many more.
    proptest! {
        #[test]
        fn what_parses_prints_back(text in "[\\[\\]0-9a-f.:]{1,30}|\\PC{0,40}") {
            if let Ok(authority) = text.parse::<Authority>() {
                prop_assert_eq!(authority.to_string().parse::<Authority>(), Ok(authority));
            }
        }

        #[test]
        fn every_address_is_an_authority(ip: IpAddr, port in 1u16..) {
            let address = SocketAddr::new(ip, port);
            prop_assert_eq!(address.to_string().parse(), Ok(Authority::Address(address)));
        }

        #[test]
        fn headers_of_any_bytes_are_no_trouble(bytes: Vec<u8>, like in "(00-)?[0-9a-f]{0,40}(-|\\PC){0,9}") {
            for value in [HeaderValue::from_bytes(&bytes), HeaderValue::from_bytes(like.as_bytes())] {
                let Ok(value) = value else { continue };
                let headers = HeaderMap::from_iter([(FORWARDED, value.clone()), (TRACEPARENT, value)]);
                prop_assert!(forwarded_host(&headers).is_none_or(|host| !host.is_empty()));
                let trace = Trace::of(&headers);
                prop_assert_eq!(trace.id.len(), 32);
                prop_assert!(trace.id.bytes().all(|byte| byte.is_ascii_hexdigit()));
            }
        }

        #[test]
        fn what_we_write_we_read(source: SocketAddr, hostname in "[a-z][a-z0-9.-]{0,60}") {
            let service = Service { hostname: hostname.clone(), ..Service::default() };
            let value = forwarded(source, Some(&service)).parse().unwrap();
            let headers = HeaderMap::from_iter([(FORWARDED, value)]);
            prop_assert_eq!(forwarded_host(&headers), Some(hostname.as_str()));
        }
    }
}
