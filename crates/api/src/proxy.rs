//! `GET /v1/proxy`: what a proxy has to know of a cluster beside the routing table.
//!
//! Leaves out: passwords and verifiers, which a proxy reads from PostgreSQL itself.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyQuery {
    /// Needed in a herd of several clusters.
    pub cluster: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxySettings {
    pub herd: String,
    pub cluster: String,
    /// Of the specification: it grows with each `apply`.
    pub generation: u64,
    /// Where clients are to reach the primary.
    pub port: u16,
    /// Where clients are to reach standbys.
    pub read_port: u16,
    pub pool: Pool,
    /// Server connections of one database and user, at most.
    pub pool_size: u32,
    /// Over `pool`, by database,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub databases: BTreeMap<String, Pool>,
    /// and over both, by user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub users: BTreeMap<String, Pool>,
    /// By the names that they have in the herd file; those that are not here have the proxy's own defaults. A reader must
    /// expect others.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, OptionValue>,
    /// Roles that may do everything in the console,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub console_admins: BTreeSet<String>,
    /// and those that may look.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub console_readers: BTreeSet<String>,
    /// Where it serves its metrics; nowhere without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<String>,
    /// As an agent of an earlier version has it.
    #[serde(default)]
    pub tls: Tls,
    /// Lines of `pg_hba.conf`, as the herd file has them, in their order.
    pub hba: Vec<String>,
    /// Lines of `pg_ident.conf`, the same way. An agent of an earlier version has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ident: Vec<String>,
    /// `https://host:port` of every agent.
    pub agents: Vec<String>,
}

/// Modes by the names that libpq gives them; a reader that does not know one must not guess. Files are those of the proxy's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tls {
    pub server_mode: String,
    pub client_mode: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert_file: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_key_file: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca_file: Option<String>,
    /// Roles whose clients show a certificate instead of a password.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub certificate_users: BTreeSet<String>,
}

impl Default for Tls {
    fn default() -> Tls {
        Tls {
            server_mode: "verify-full".to_owned(),
            client_mode: "prefer".to_owned(),
            client_cert_file: None,
            client_key_file: None,
            client_ca_file: None,
            certificate_users: BTreeSet::new(),
        }
    }
}

/// Of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OptionValue {
    Switch(bool),
    Whole(u64),
    Time {
        /// Null: never.
        ms: Option<u64>,
    },
}

/// Readers must expect others: a proxy that does not know one refuses it by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    Session,
    Transaction,
    Statement,
}
