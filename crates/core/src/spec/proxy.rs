//! What the proxies of a cluster do, wherever they run.
//!
//! What has a default that fits nearly everybody is a [`ProxyOption`]: its name, its default and its bounds stand here, and
//! the herd file, `plan` and the proxies go by that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{DEFAULT_POOL_SIZE, DEFAULT_PROXY_PORT, DEFAULT_PROXY_READ_PORT, ProxyTls, Span};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxySpec {
    /// Where clients reach the primary.
    pub port: u16,
    /// Where clients reach standbys.
    pub read_port: u16,
    pub pool: Pool,
    /// Server connections of one database and user, at most.
    #[serde(default = "default_pool_size", skip_serializing_if = "is_default_pool_size")]
    pub pool_size: u32,
    /// Over `pool`, by database,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub databases: BTreeMap<String, Pool>,
    /// and over both, by user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub users: BTreeMap<String, Pool>,
    /// Roles that may do everything in the proxies' console,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub console_admins: BTreeSet<String>,
    /// and those that may look.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub console_readers: BTreeSet<String>,
    /// Where each proxy serves its metrics, as an address with its port; nowhere without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<String>,
    #[serde(default, skip_serializing_if = "ProxyTls::is_default")]
    pub tls: ProxyTls,
    /// Those that were said; the others have their defaults.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<ProxyOption, OptionValue>,
}

fn default_pool_size() -> u32 {
    DEFAULT_POOL_SIZE
}

fn is_default_pool_size(size: &u32) -> bool {
    *size == DEFAULT_POOL_SIZE
}

impl Default for ProxySpec {
    fn default() -> ProxySpec {
        ProxySpec {
            port: DEFAULT_PROXY_PORT,
            read_port: DEFAULT_PROXY_READ_PORT,
            pool: Pool::Transaction,
            pool_size: DEFAULT_POOL_SIZE,
            databases: BTreeMap::new(),
            users: BTreeMap::new(),
            console_admins: BTreeSet::new(),
            console_readers: BTreeSet::new(),
            metrics_listen: None,
            tls: ProxyTls::default(),
            options: BTreeMap::new(),
        }
    }
}

impl ProxySpec {
    pub fn option(&self, option: ProxyOption) -> OptionValue {
        self.options.get(&option).copied().unwrap_or(option.default())
    }
}

/// For how long a client has a server connection to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// Until it leaves.
    Session,
    /// While a transaction lasts.
    Transaction,
    /// While a statement lasts; transactions of several statements are refused.
    Statement,
}

impl Pool {
    pub const ALL: [Pool; 3] = [Pool::Session, Pool::Transaction, Pool::Statement];

    pub fn as_str(self) -> &'static str {
        match self {
            Pool::Session => "session",
            Pool::Transaction => "transaction",
            Pool::Statement => "statement",
        }
    }

    /// By its name in the herd file.
    pub fn named(name: &str) -> Option<Pool> {
        Pool::ALL.into_iter().find(|pool| pool.as_str() == name)
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Meanings and units stand in the reference of the herd file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyOption {
    SplitReads,
    ReadYourWrites,
    ReadWait,
    MaxReplayLag,
    UnconfirmedReads,
    MaxClients,
    MaxUserClients,
    MaxDatabaseClients,
    QueryWait,
    Hold,
    CommitCheck,
    Md5Passwords,
    LoginTimeout,
    ClientIdleTimeout,
    IdleTransactionTimeout,
    TransactionTimeout,
    QueryTimeout,
    ServerIdleTimeout,
    ServerLifetime,
}

/// As the option says what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OptionValue {
    Switch(bool),
    Whole(u64),
    Time {
        /// `None`: never.
        ms: Option<u64>,
    },
}

impl OptionValue {
    const NEVER: OptionValue = OptionValue::Time { ms: None };

    const fn time(ms: u64) -> OptionValue {
        OptionValue::Time { ms: Some(ms) }
    }

    pub fn of_time(time: Option<Duration>) -> OptionValue {
        OptionValue::Time { ms: time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)) }
    }
}

impl fmt::Display for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OptionValue::Switch(on) => write!(f, "{on}"),
            OptionValue::Whole(number) => write!(f, "{number}"),
            OptionValue::Time { ms: None } => f.write_str("never"),
            OptionValue::Time { ms: Some(ms) } => Span(Duration::from_millis(*ms)).fmt(f),
        }
    }
}

impl ProxyOption {
    pub const ALL: [ProxyOption; 19] = [
        ProxyOption::SplitReads,
        ProxyOption::ReadYourWrites,
        ProxyOption::ReadWait,
        ProxyOption::MaxReplayLag,
        ProxyOption::UnconfirmedReads,
        ProxyOption::MaxClients,
        ProxyOption::MaxUserClients,
        ProxyOption::MaxDatabaseClients,
        ProxyOption::QueryWait,
        ProxyOption::Hold,
        ProxyOption::CommitCheck,
        ProxyOption::Md5Passwords,
        ProxyOption::LoginTimeout,
        ProxyOption::ClientIdleTimeout,
        ProxyOption::IdleTransactionTimeout,
        ProxyOption::TransactionTimeout,
        ProxyOption::QueryTimeout,
        ProxyOption::ServerIdleTimeout,
        ProxyOption::ServerLifetime,
    ];

    /// As in the herd file.
    pub fn name(self) -> &'static str {
        match self {
            ProxyOption::SplitReads => "split_reads",
            ProxyOption::ReadYourWrites => "read_your_writes",
            ProxyOption::ReadWait => "read_wait",
            ProxyOption::MaxReplayLag => "max_replay_lag",
            ProxyOption::UnconfirmedReads => "unconfirmed_reads",
            ProxyOption::MaxClients => "max_clients",
            ProxyOption::MaxUserClients => "max_user_clients",
            ProxyOption::MaxDatabaseClients => "max_database_clients",
            ProxyOption::QueryWait => "query_wait",
            ProxyOption::Hold => "hold",
            ProxyOption::CommitCheck => "commit_check",
            ProxyOption::Md5Passwords => "md5_passwords",
            ProxyOption::LoginTimeout => "login_timeout",
            ProxyOption::ClientIdleTimeout => "client_idle_timeout",
            ProxyOption::IdleTransactionTimeout => "idle_transaction_timeout",
            ProxyOption::TransactionTimeout => "transaction_timeout",
            ProxyOption::QueryTimeout => "query_timeout",
            ProxyOption::ServerIdleTimeout => "server_idle_timeout",
            ProxyOption::ServerLifetime => "server_lifetime",
        }
    }

    pub fn default(self) -> OptionValue {
        match self {
            ProxyOption::SplitReads
            | ProxyOption::UnconfirmedReads
            | ProxyOption::CommitCheck
            | ProxyOption::Md5Passwords => OptionValue::Switch(false),
            ProxyOption::ReadYourWrites => OptionValue::Switch(true),
            ProxyOption::ReadWait => OptionValue::time(50),
            ProxyOption::MaxReplayLag => OptionValue::time(30_000),
            ProxyOption::MaxClients => OptionValue::Whole(10_000),
            // None but that.
            ProxyOption::MaxUserClients | ProxyOption::MaxDatabaseClients => OptionValue::Whole(0),
            ProxyOption::QueryWait => OptionValue::time(120_000),
            ProxyOption::Hold | ProxyOption::LoginTimeout => OptionValue::time(60_000),
            ProxyOption::ClientIdleTimeout
            | ProxyOption::IdleTransactionTimeout
            | ProxyOption::TransactionTimeout
            | ProxyOption::QueryTimeout => OptionValue::NEVER,
            ProxyOption::ServerIdleTimeout => OptionValue::time(600_000),
            ProxyOption::ServerLifetime => OptionValue::time(3_600_000),
        }
    }

    /// Of a number: the least and the greatest.
    pub fn bounds(self) -> (u64, u64) {
        let least = u64::from(self == ProxyOption::MaxClients);
        (least, 1_000_000)
    }

    /// Of a time: may it be `never`?
    pub fn can_be_never(self) -> bool {
        self.default() == OptionValue::NEVER || self == ProxyOption::MaxReplayLag
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_stored_by_the_name_that_it_has_in_the_file() {
        for option in ProxyOption::ALL {
            assert_eq!(serde_json::to_string(&option).unwrap(), format!("\"{}\"", option.name()));
        }
        let spec = ProxySpec {
            options: [
                (ProxyOption::SplitReads, OptionValue::Switch(true)),
                (ProxyOption::MaxClients, OptionValue::Whole(7)),
                (ProxyOption::ReadWait, OptionValue::time(1_500)),
                (ProxyOption::MaxReplayLag, OptionValue::NEVER),
            ]
            .into(),
            ..ProxySpec::default()
        };
        let stored = serde_json::to_string(&spec).unwrap();
        let options = r#""options":{"split_reads":true,"read_wait":{"ms":1500},"max_replay_lag":{"ms":null},"max_clients":7}"#;
        assert!(stored.contains(options), "{stored}");
        assert_eq!(serde_json::from_str::<ProxySpec>(&stored).unwrap(), spec);
        let said: Vec<String> = spec.options.values().map(ToString::to_string).collect();
        assert_eq!(said, ["true", "1500ms", "never", "7"]);
        assert_eq!(spec.option(ProxyOption::QueryWait).to_string(), "2min");
        assert!(
            serde_json::from_str::<ProxySpec>(&stored.replace("hold", "held").replace("max_clients", "most"))
                .is_err()
        );
    }
}
