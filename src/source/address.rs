//! Which addresses a volume may make the node talk to.
//!
//! A location inside an archive or a volume attribute is somebody else's wish. It must not lead to the cloud's metadata
//! service (the node's own credentials) nor to services that listen on the node itself.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// How far a request may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Reach {
    /// Anywhere: the shell.
    Any,
    /// A host that the configuration names: loopback is fine, link-local and metadata addresses are not.
    Configured,
    /// A host that a volume names: neither loopback nor link-local nor metadata.
    Volume,
}

/// A host or address that the policy refuses. Travels through the HTTP clients' error chains.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{host} is {why}, which volumes may not reach")]
pub(super) struct Refused {
    pub(super) host: String,
    pub(super) why: &'static str,
}

/// Metadata services outside the link-local ranges: AWS and GCP on IPv6, Alibaba, Azure's host, Oracle.
const METADATA: &[IpAddr] = &[
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

impl Reach {
    /// What makes the address unreachable for this kind of request; `None`: it may be reached.
    pub(super) fn objection(self, address: IpAddr) -> Option<&'static str> {
        if self == Self::Any {
            return None;
        }
        let address = inner(address);
        if METADATA.contains(&address) {
            return Some("a metadata service");
        }
        let (link_local, odd) = match address {
            IpAddr::V4(v4) => (v4.is_link_local(), v4.is_multicast() || v4.is_broadcast()),
            IpAddr::V6(v6) => (v6.is_unicast_link_local(), v6.is_multicast()),
        };
        if link_local {
            return Some("a link-local address");
        }
        if odd {
            return Some("a multicast or broadcast address");
        }
        // 0.0.0.0/8 means this very host.
        let this_host = address.is_unspecified() || matches!(address, IpAddr::V4(v4) if v4.octets()[0] == 0);
        (self == Self::Volume && (address.is_loopback() || this_host)).then_some("an address of the node itself")
    }

    /// Checks a URL's host as far as it can be without a resolver.
    pub(super) fn check_host(self, host: &str) -> Result<(), Refused> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let why = match bare.parse::<IpAddr>() {
            Ok(address) => self.objection(address),
            Err(_) => {
                let name = bare.trim_end_matches('.').to_ascii_lowercase();
                let local = name == "localhost" || name.ends_with(".localhost");
                (self == Self::Volume && local).then_some("an address of the node itself")
            }
        };
        why.map_or(Ok(()), |why| Err(Refused { host: host.to_owned(), why }))
    }

    /// Resolves a name and keeps the addresses that may be reached; an error if that leaves none.
    pub(super) async fn lookup(self, name: &str) -> Result<Vec<SocketAddr>, Box<dyn Error + Send + Sync>> {
        let (mut allowed, mut refused) = (Vec::new(), None);
        for address in tokio::net::lookup_host((name, 0)).await? {
            match self.objection(address.ip()) {
                Some(why) => refused = Some(Refused { host: format!("{name} ({})", address.ip()), why }),
                None => allowed.push(address),
            }
        }
        match refused {
            Some(refused) if allowed.is_empty() => Err(refused.into()),
            _ => Ok(allowed),
        }
    }
}

/// The IPv4 address that an IPv6 one stands for (mapped, compatible, NAT64, 6to4): it reaches the same host.
fn inner(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let s = v6.segments();
    let v4 = |hi: u16, lo: u16| {
        let ([a, b], [c, d]) = (hi.to_be_bytes(), lo.to_be_bytes());
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        [0, 0, 0, 0, 0, 0xffff, hi, lo] => v4(hi, lo),
        [0, 0, 0, 0, 0, 0, hi, lo] if hi != 0 => v4(hi, lo),
        [0x64, 0xff9b, 0, 0, 0, 0, hi, lo] => v4(hi, lo),
        [0x2002, hi, lo, ..] => v4(hi, lo),
        _ => address,
    }
}

/// The first error of a kind in a chain of causes, also where one is wrapped in `io::Error`s (their `source` skips it).
pub(super) fn find_cause<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let wrapped = || error.downcast_ref::<std::io::Error>()?.get_ref();
    error
        .downcast_ref()
        .or_else(|| wrapped().and_then(|inner| find_cause(inner)))
        .or_else(|| error.source().and_then(find_cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_addresses_are_refused_in_every_spelling() {
        for text in [
            "169.254.169.254",
            "169.254.170.2",
            "fe80::1",
            "fd00:ec2::254",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "100.100.100.200",
            "168.63.129.16",
            "224.0.0.1",
        ] {
            let address = text.parse().unwrap();
            assert!(Reach::Volume.objection(address).is_some(), "{text}");
            assert!(Reach::Configured.objection(address).is_some(), "{text}");
            assert!(Reach::Any.objection(address).is_none(), "{text}");
        }
    }

    #[test]
    fn loopback_is_for_configured_hosts_only() {
        for text in ["127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "0.1.2.3", "::", "::ffff:127.0.0.1"] {
            let address = text.parse().unwrap();
            assert!(Reach::Volume.objection(address).is_some(), "{text}");
            assert!(Reach::Configured.objection(address).is_none(), "{text}");
        }
        for text in ["10.0.0.1", "192.168.1.1", "1.1.1.1", "2606:4700::1111", "fd00::1"] {
            assert!(Reach::Volume.objection(text.parse().unwrap()).is_none(), "{text}");
        }
    }

    #[tokio::test]
    async fn names_of_the_node_itself_are_refused_before_and_after_resolution() {
        for host in ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "[::1]"] {
            assert!(Reach::Volume.check_host(host).is_err(), "{host}");
            assert!(Reach::Configured.check_host(host).is_ok(), "{host}");
        }
        let error = Reach::Volume.lookup("localhost").await.unwrap_err();
        assert!(find_cause::<Refused>(error.as_ref()).is_some());
        assert!(!Reach::Configured.lookup("localhost").await.unwrap().is_empty());
    }
}
