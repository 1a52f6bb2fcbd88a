//! How strictly TLS is demanded of servers and of clients: libpq's six modes, and what stands beside them.
//!
//! Leaves out how a handshake is done and what a certificate must look like. Hazard: a default that believes more than the
//! herd's authority says; so the default towards servers is the strictest one.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// From nothing to everything, so that the stricter of two is the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl TlsMode {
    pub const ALL: [TlsMode; 6] = [
        TlsMode::Disable,
        TlsMode::Allow,
        TlsMode::Prefer,
        TlsMode::Require,
        TlsMode::VerifyCa,
        TlsMode::VerifyFull,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            TlsMode::Disable => "disable",
            TlsMode::Allow => "allow",
            TlsMode::Prefer => "prefer",
            TlsMode::Require => "require",
            TlsMode::VerifyCa => "verify-ca",
            TlsMode::VerifyFull => "verify-full",
        }
    }

    /// By its name in the herd file.
    pub fn named(name: &str) -> Option<TlsMode> {
        TlsMode::ALL.into_iter().find(|mode| mode.as_str() == name)
    }

    /// Nothing is said in clear but the request for TLS.
    pub fn is_demanded(self) -> bool {
        self >= TlsMode::Require
    }
}

impl fmt::Display for TlsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Of all proxies of a cluster. Files are those of each proxy's own host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyTls {
    /// For connections in the names of clients; those for the proxy's own questions are always verified in full.
    #[serde(default = "server_mode", skip_serializing_if = "is_server_mode")]
    pub server_mode: TlsMode,
    #[serde(default = "client_mode", skip_serializing_if = "is_client_mode")]
    pub client_mode: TlsMode,
    /// What clients are shown, with its key, in place of the certificate that the herd's authority made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert_file: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_key_file: Option<String>,
    /// Whose certificates clients may show.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca_file: Option<String>,
    /// Roles whose clients show a certificate instead of a password: PostgreSQL lets proxies in for them by the proxies' own.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub certificate_users: BTreeSet<String>,
}

fn server_mode() -> TlsMode {
    TlsMode::VerifyFull
}

fn is_server_mode(mode: &TlsMode) -> bool {
    *mode == server_mode()
}

fn client_mode() -> TlsMode {
    TlsMode::Prefer
}

fn is_client_mode(mode: &TlsMode) -> bool {
    *mode == client_mode()
}

impl Default for ProxyTls {
    fn default() -> ProxyTls {
        ProxyTls {
            server_mode: server_mode(),
            client_mode: client_mode(),
            client_cert_file: None,
            client_key_file: None,
            client_ca_file: None,
            certificate_users: BTreeSet::new(),
        }
    }
}

impl ProxyTls {
    /// Its texts, by their keys in the herd file.
    pub fn files(&self) -> [(&'static str, Option<&String>); 3] {
        [
            ("client_tls_cert_file", self.client_cert_file.as_ref()),
            ("client_tls_key_file", self.client_key_file.as_ref()),
            ("client_tls_ca_file", self.client_ca_file.as_ref()),
        ]
    }

    /// And its modes.
    pub fn modes(&self) -> [(&'static str, TlsMode); 2] {
        [("server_tls_mode", self.server_mode), ("client_tls_mode", self.client_mode)]
    }

    pub(super) fn is_default(&self) -> bool {
        *self == ProxyTls::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_stored_by_the_name_that_libpq_gives_it() {
        for mode in TlsMode::ALL {
            assert_eq!(serde_json::to_string(&mode).unwrap(), format!("\"{mode}\""));
            assert_eq!(TlsMode::named(mode.as_str()), Some(mode));
        }
        assert_eq!(TlsMode::named("verify_full"), None);
        assert!(TlsMode::Prefer < TlsMode::Require && !TlsMode::Prefer.is_demanded());
    }

    #[test]
    fn what_was_stored_before_there_were_modes_is_what_it_was() {
        assert_eq!(serde_json::from_str::<ProxyTls>("{}").unwrap(), ProxyTls::default());
        assert_eq!(serde_json::to_string(&ProxyTls::default()).unwrap(), "{}");
    }
}
