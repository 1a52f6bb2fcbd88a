//! The herd's authority: it is made once, by `init`, and says which keys are nodes, which are operators and which
//! are proxies.
//!
//! Nothing of a request is copied into a certificate except its public key: the names are those that the
//! caller has checked. So a request cannot smuggle in an authority, a usage or another node's name.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_api::client::CaPin;
use pgherd_api::identity::Identity;
use pgherd_core::types::{Malformed, NodeName};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
    SanType, date_time_ymd,
};
use rustls::pki_types::CertificateDer;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Nobody should have to think of it within the life of a herd.
pub const CA_VALIDITY: Duration = DAY.saturating_mul(20 * 365);

/// Agents renew theirs when a third is left; a herd that is switched off for a year still starts.
pub const NODE_VALIDITY: Duration = DAY.saturating_mul(5 * 365);

/// People leave.
pub const OPERATOR_VALIDITY: Duration = DAY.saturating_mul(365);

/// At most, for one that a proxy asks for itself; it asks again when a third is left.
pub const PROXY_VALIDITY: Duration = DAY.saturating_mul(365);

/// Certificates are valid from so long before they were made: hosts' clocks differ.
pub(super) const CLOCK_SKEW: Duration = DAY;

/// Names besides the node's own in one certificate.
const MAX_HOSTS: usize = 16;

/// `[a-z][a-z0-9_.-]{0,47}`: an operator is a person or a program, and people's names have dots.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperatorName(String);

impl OperatorName {
    /// Whoever may use the agent's Unix socket. Never in a certificate.
    pub fn local() -> OperatorName {
        OperatorName(LOCAL_OPERATOR.to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

const LOCAL_OPERATOR: &str = "local";

impl FromStr for OperatorName {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<OperatorName, Malformed> {
        let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
        let allowed = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'.' | b'-')
        };
        if first && text.bytes().all(allowed) && text.len() <= NodeName::MAX_BYTES && text != LOCAL_OPERATOR {
            return Ok(OperatorName(text.to_owned()));
        }
        Err(Malformed {
            what: "an operator's name: a lower-case letter, then up to 47 of a-z, 0-9, '_', '.', '-'; not \"local\"",
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for OperatorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What a node's certificate will say.
#[derive(Clone, Debug)]
pub struct NodeSubject<'a> {
    pub name: &'a NodeName,
    /// Host names and IP addresses under which PostgreSQL's clients reach the node.
    pub hosts: &'a [String],
    /// All other nodes of the herd. libpq's `verify-full` goes by DNS names, so a host must not be called
    /// like another node.
    pub others: &'a [NodeName],
}

/// What a proxy's certificate will say.
#[derive(Clone, Debug)]
pub struct ProxySubject<'a> {
    pub name: &'a NodeName,
    /// Host names and IP addresses under which clients reach the proxy.
    pub hosts: &'a [String],
    /// All nodes of the herd. Whoever dials the PostgreSQL of a node verifies that node's name, which a proxy's
    /// certificate must not bear.
    pub nodes: &'a [NodeName],
}

#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("the certificate request cannot be read: {0}")]
    Request(rcgen::Error),
    #[error("the certificate request is not for an ECDSA P-256 key")]
    KeyKind,
    #[error("\"{0}\" is not a host name or IP address")]
    Host(String),
    #[error("the host name \"{host}\" of {of} is the name of another node")]
    HostIsANode { of: Identity, host: String },
    #[error("{count} host names in one certificate; at most {MAX_HOSTS} are taken")]
    TooManyHosts { count: usize },
    #[error("the authority has expired")]
    AuthorityExpired,
    #[error("the certificate cannot be made: {0}")]
    Make(rcgen::Error),
}

/// The authority's private key as PEM text. No `Display`, and a `Debug` that says nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthorityKey(String);

impl AuthorityKey {
    pub fn from_pem(pem: String) -> AuthorityKey {
        AuthorityKey(pem)
    }

    /// For the store, and for nothing else.
    pub fn expose_pem(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for AuthorityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthorityKey(…)")
    }
}

pub struct Authority {
    certificate: CertificateDer<'static>,
    pem: String,
    not_after: Timestamp,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("pin", &self.pin()).field("not_after", &self.not_after).finish()
    }
}

impl Authority {
    /// A fresh one, with its key.
    pub fn create(
        herd: &NodeName,
        herd_id: &str,
        now: Timestamp,
        validity: Duration,
    ) -> Result<(Authority, AuthorityKey), IssueError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(IssueError::Make)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&format!("pgherd {herd} {herd_id}"));
        // A certificate knows whole seconds.
        let not_after = later(now, validity);
        let not_after = Timestamp::from_second(not_after.as_second()).unwrap_or(not_after);
        set_validity(&mut params, now, not_after);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(IssueError::Make)?;
        let text = AuthorityKey(key.serialize_pem());
        let authority = Authority {
            pem: certificate.pem(),
            certificate: certificate.der().clone(),
            not_after,
            issuer: Issuer::new(params, key),
        };
        Ok((authority, text))
    }

    /// Back from the store.
    pub fn from_pem(certificate_pem: &str, key: &AuthorityKey) -> Result<Authority, super::CredentialsError> {
        let certificate = super::credentials::one_certificate(certificate_pem)?;
        let not_after = super::credentials::not_after(&certificate)?;
        let key = KeyPair::from_pem(key.expose_pem()).map_err(|_| super::CredentialsError::Key)?;
        super::credentials::check_key_fits(&certificate, &key)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| super::CredentialsError::Unreadable(error.to_string()))?;
        Ok(Authority { pem: certificate_pem.to_owned(), certificate, not_after, issuer })
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub fn certificate_pem(&self) -> &str {
        &self.pem
    }

    pub fn expires(&self) -> Timestamp {
        self.not_after
    }

    /// What a join token carries.
    pub fn pin(&self) -> CaPin {
        CaPin::of(&self.certificate)
    }

    /// A certificate as PEM for the key in the request.
    pub fn issue_node(
        &self,
        request_pem: &str,
        subject: &NodeSubject<'_>,
        now: Timestamp,
        validity: Duration,
    ) -> Result<String, IssueError> {
        let identity = Identity::Node(subject.name.to_string());
        let own = subject.name.as_str();
        let hosts: Vec<&String> = subject.hosts.iter().filter(|host| *host != own).collect();
        let mut names = vec![dns_name(own)?];
        names.extend(host_names(&identity, &hosts, subject.others)?);
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(request_pem, own, identity, names, usages, now, validity)
    }

    /// A proxy is a client of agents and of PostgreSQL, which knows it by its common name, the same text as its
    /// identity; and a server to its own clients.
    pub fn issue_proxy(
        &self,
        request_pem: &str,
        subject: &ProxySubject<'_>,
        now: Timestamp,
        validity: Duration,
    ) -> Result<String, IssueError> {
        let identity = Identity::Proxy(subject.name.to_string());
        let names = host_names(&identity, &subject.hosts.iter().collect::<Vec<_>>(), subject.nodes)?;
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(request_pem, &identity.uri(), identity, names, usages, now, validity)
    }

    /// An operator's certificate is a client's only: it cannot pass as an agent or a PostgreSQL server, and
    /// its common name, `operator:anna`, is no name that a role or a node can have in the generated hba.
    pub fn issue_operator(
        &self,
        request_pem: &str,
        name: &OperatorName,
        now: Timestamp,
        validity: Duration,
    ) -> Result<String, IssueError> {
        let identity = Identity::Operator(name.to_string());
        let usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(request_pem, &format!("operator:{name}"), identity, Vec::new(), usages, now, validity)
    }

    #[expect(clippy::too_many_arguments, reason = "private, and each of the three callers names all of them")]
    fn issue(
        &self,
        request_pem: &str,
        name: &str,
        identity: Identity,
        mut names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
        now: Timestamp,
        validity: Duration,
    ) -> Result<String, IssueError> {
        let key =
            CertificateSigningRequestParams::from_pem(request_pem).map_err(IssueError::Request)?.public_key;
        let is_uncompressed_p256_point = key.der_bytes().len() == 65 && key.der_bytes()[0] == 4;
        if key.algorithm() != &PKCS_ECDSA_P256_SHA256 || !is_uncompressed_p256_point {
            return Err(IssueError::KeyKind);
        }
        if self.not_after <= now {
            return Err(IssueError::AuthorityExpired);
        }
        let uri = identity.uri().try_into().map_err(IssueError::Make)?;
        names.push(SanType::URI(uri));
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        params.subject_alt_names = names;
        // A certificate that outlives its authority would fail at a time that it does not show.
        set_validity(&mut params, now, later(now, validity).min(self.not_after));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        let certificate = params.signed_by(&key, &self.issuer).map_err(IssueError::Make)?;
        Ok(certificate.pem())
    }
}

/// The public key of a request, as its `SubjectPublicKeyInfo`: what a join token remembers its user by.
pub fn key_of_request(request_pem: &str) -> Result<Vec<u8>, IssueError> {
    let request = CertificateSigningRequestParams::from_pem(request_pem).map_err(IssueError::Request)?;
    Ok(request.public_key.subject_public_key_info())
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn dns_name(name: &str) -> Result<SanType, IssueError> {
    let text = name.to_owned().try_into().map_err(|_| IssueError::Host(name.to_owned()))?;
    Ok(SanType::DnsName(text))
}

/// The names of hosts that a certificate bears, none of which may be that of a node in `nodes`.
fn host_names(of: &Identity, hosts: &[&String], nodes: &[NodeName]) -> Result<Vec<SanType>, IssueError> {
    if hosts.len() > MAX_HOSTS {
        return Err(IssueError::TooManyHosts { count: hosts.len() });
    }
    let mut names = Vec::with_capacity(hosts.len());
    for host in hosts {
        if nodes.iter().any(|node| node.as_str().eq_ignore_ascii_case(host)) {
            return Err(IssueError::HostIsANode { of: of.clone(), host: (*host).clone() });
        }
        names.push(host_name(host)?);
    }
    Ok(names)
}

fn host_name(host: &str) -> Result<SanType, IssueError> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let label_fits = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    match host.len() <= 253 && host.split('.').all(label_fits) {
        true => dns_name(host),
        false => Err(IssueError::Host(host.to_owned())),
    }
}

fn later(now: Timestamp, span: Duration) -> Timestamp {
    now.checked_add(span).unwrap_or(Timestamp::MAX)
}

/// From [`CLOCK_SKEW`] before `now`. Beyond the year 9999, X.509 has no dates.
fn set_validity(params: &mut CertificateParams, now: Timestamp, not_after: Timestamp) {
    let epoch = date_time_ymd(1970, 1, 1);
    let since_epoch = |moment: Timestamp| Duration::from_secs(u64::try_from(moment.as_second()).unwrap_or(0));
    params.not_before = epoch + since_epoch(now).saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + since_epoch(not_after);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::{Credentials, NewKey};

    fn now() -> Timestamp {
        "2026-11-20T20:54:54Z".parse().unwrap()
    }

    fn authority() -> (Authority, AuthorityKey) {
        Authority::create(&"shop".parse().unwrap(), "4f1c", now(), CA_VALIDITY).unwrap()
    }

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    fn issue(authority: &Authority, node: &str, hosts: &[&str]) -> Result<String, IssueError> {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let subject = NodeSubject { name: &name(node), hosts: &hosts, others: &[name("other")] };
        authority.issue_node(&NewKey::generate().unwrap().request().unwrap(), &subject, now(), NODE_VALIDITY)
    }

    #[test]
    fn an_authority_comes_back_from_its_two_texts() {
        let (made, key) = authority();
        let back = Authority::from_pem(made.certificate_pem(), &key).unwrap();
        assert_eq!((back.pin(), back.expires()), (made.pin(), made.expires()));
        let (_, other_key) = authority();
        assert!(Authority::from_pem(made.certificate_pem(), &other_key).is_err(), "the key of another one");
        assert_eq!(format!("{key:?}"), "AuthorityKey(…)");
    }

    #[test]
    fn a_node_certificate_holds_the_names_that_were_checked_and_no_others() {
        let (authority, _) = authority();
        let key = NewKey::generate().unwrap();
        // A request that asks for far more than it gets.
        let mut greedy = CertificateParams::new(vec!["other".to_owned()]).unwrap();
        greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        greedy.subject_alt_names.push(SanType::URI("pgherd:operator/root".to_owned().try_into().unwrap()));
        let pair = KeyPair::from_pem(&key.expose_pem()).unwrap();
        let request = greedy.serialize_request(&pair).unwrap().pem().unwrap();

        let hosts = ["10.0.0.7".to_owned(), "db_7.example.org".to_owned(), "a".to_owned()];
        let subject = NodeSubject { name: &name("a"), hosts: &hosts, others: &[] };
        let pem = authority.issue_node(&request, &subject, now(), NODE_VALIDITY).unwrap();

        let credentials =
            Credentials::from_pem(authority.certificate_pem(), &pem, &key.expose_pem()).unwrap();
        assert_eq!(credentials.identity(), &Identity::Node("a".to_owned()));
        let certificate = crate::pki::credentials::one_certificate(&pem).unwrap();
        let parsed = webpki::EndEntityCert::try_from(&certificate).unwrap();
        assert_eq!(parsed.valid_dns_names().collect::<Vec<_>>(), ["a", "db_7.example.org"]);
        assert_eq!(parsed.valid_uri_names().collect::<Vec<_>>(), ["pgherd:node/a"]);
    }

    #[test]
    fn hosts_that_would_deceive_are_refused() {
        let (authority, _) = authority();
        assert!(issue(&authority, "a", &["127.0.0.1", "::1", "localhost"]).is_ok());
        assert!(matches!(issue(&authority, "a", &["other"]), Err(IssueError::HostIsANode { .. })));
        assert!(matches!(issue(&authority, "a", &["OTHER"]), Err(IssueError::HostIsANode { .. })));
        for wrong in ["", "a b", "*.example.org", "a..b", "host\0", "ä.example", &"x".repeat(64)] {
            assert!(matches!(issue(&authority, "a", &[wrong]), Err(IssueError::Host(_))), "{wrong:?}");
        }
        let many: Vec<String> = (0..17).map(|i| format!("h{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(matches!(issue(&authority, "a", &many), Err(IssueError::TooManyHosts { count: 17 })));
    }

    #[test]
    fn a_proxys_certificate_says_that_it_is_one_and_bears_no_nodes_name() {
        let (authority, _) = authority();
        let key = NewKey::generate().unwrap();
        let issue = |hosts: &[&str]| {
            let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
            let subject = ProxySubject { name: &name("up"), hosts: &hosts, nodes: &[name("a"), name("b")] };
            authority.issue_proxy(&key.request().unwrap(), &subject, now(), PROXY_VALIDITY)
        };
        let pem = issue(&["db.example.org", "127.0.0.1"]).unwrap();
        let credentials =
            Credentials::from_pem(authority.certificate_pem(), &pem, &key.expose_pem()).unwrap();
        assert_eq!(credentials.identity(), &Identity::Proxy("up".to_owned()));
        let certificate = crate::pki::credentials::one_certificate(&pem).unwrap();
        let parsed = webpki::EndEntityCert::try_from(&certificate).unwrap();
        assert_eq!(parsed.valid_dns_names().collect::<Vec<_>>(), ["db.example.org"]);
        assert_eq!(parsed.valid_uri_names().collect::<Vec<_>>(), ["pgherd:proxy/up"]);
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
        let common: Vec<&str> =
            parsed.subject().iter_common_name().map(|name| name.as_str().unwrap()).collect();
        assert_eq!(common, ["pgherd:proxy/up"]);
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && usage.server_auth, "{usage:?}");

        for wrong in ["a", "B"] {
            assert!(matches!(issue(&[wrong]), Err(IssueError::HostIsANode { .. })), "{wrong}");
        }
        assert!(matches!(issue(&["*.example.org"]), Err(IssueError::Host(_))));
        assert!(matches!(issue(&["h"; 17]), Err(IssueError::TooManyHosts { count: 17 })));
    }

    #[test]
    fn only_p256_keys_are_signed() {
        let (authority, _) = authority();
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let request = CertificateParams::default().serialize_request(&p384).unwrap().pem().unwrap();
        let subject = NodeSubject { name: &name("a"), hosts: &[], others: &[] };
        let refused = authority.issue_node(&request, &subject, now(), NODE_VALIDITY);
        assert!(matches!(refused, Err(IssueError::KeyKind)));
        for wrong in ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
            let refused = authority.issue_node(wrong, &subject, now(), NODE_VALIDITY);
            assert!(matches!(refused, Err(IssueError::Request(_))));
        }
    }

    #[test]
    fn no_certificate_outlives_its_authority() {
        let day = Duration::from_secs(86400);
        let (authority, _) = Authority::create(&name("shop"), "4f1c", now(), day).unwrap();
        let key = NewKey::generate().unwrap();
        let subject = NodeSubject { name: &name("a"), hosts: &[], others: &[] };
        let pem = authority.issue_node(&key.request().unwrap(), &subject, now(), NODE_VALIDITY).unwrap();
        let credentials =
            Credentials::from_pem(authority.certificate_pem(), &pem, &key.expose_pem()).unwrap();
        assert_eq!(credentials.expires(), authority.expires());
        let refused = authority.issue_node(&key.request().unwrap(), &subject, authority.expires(), day);
        assert!(matches!(refused, Err(IssueError::AuthorityExpired)));
    }

    #[test]
    fn operators_are_named_like_people_and_never_local() {
        for right in ["anna", "anna.schmidt", "ci-runner_2"] {
            assert!(right.parse::<OperatorName>().is_ok());
        }
        for wrong in ["", "local", "Anna", "a b", "a/b", "9a", &"x".repeat(49)] {
            assert!(wrong.parse::<OperatorName>().is_err(), "{wrong:?}");
        }
    }
}
