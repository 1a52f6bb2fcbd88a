//! `pgherd.conf`: the four settings that change while PostgreSQL runs.
//!
//! Hazard: an empty synchronous list acknowledges every commit at once (L4c), also those that wait.

use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::str::FromStr;

use pgherd_core::types::{Member, NodeName, Stream, Timeline};

use crate::conf::{MANAGED_CONF, parse, quoted};
use crate::durable;
use crate::error::Result;
use crate::instance::{Instance, TlsFiles};
use crate::secret::Secret;

/// A name that no standby can have: PostgreSQL cuts an `application_name` at 63 bytes.
const NOBODY: &str = "pgherd_waits_for_a_voter_under_a_name_too_long_for_an_application_name";

/// `synchronous_standby_names`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum SyncNames {
    /// No commit waits. Only for a rule that needs no voter.
    Empty,
    /// Every commit waits, and nobody can end that. What a quorum cluster has while it has no voter, and the first
    /// step away from [`SyncNames::Empty`].
    #[default]
    Nobody,
    Any {
        needed: usize,
        streams: Vec<Stream>,
    },
}

impl SyncNames {
    /// Commits wait under it.
    pub fn waits(&self) -> bool {
        !matches!(self, SyncNames::Empty)
    }

    /// How many of the names a commit waits for.
    pub fn needed(&self) -> usize {
        match self {
            SyncNames::Empty => 0,
            SyncNames::Nobody => 1,
            SyncNames::Any { needed, .. } => *needed,
        }
    }
}

impl fmt::Display for SyncNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SyncNames::Empty => Ok(()),
            SyncNames::Nobody => write!(f, "ANY 1 ({NOBODY})"),
            // A list without members would be a syntax error, and PostgreSQL would keep the one before.
            SyncNames::Any { streams, .. } if streams.is_empty() => SyncNames::Nobody.fmt(f),
            SyncNames::Any { needed, streams } => {
                let names: Vec<String> = streams.iter().map(|stream| format!("\"{stream}\"")).collect();
                write!(f, "ANY {needed} ({})", names.join(", "))
            }
        }
    }
}

/// A list that pgherd did not write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("synchronous_standby_names = '{0}' was not set by pgherd")]
pub struct SyncNamesError(pub String);

impl FromStr for SyncNames {
    type Err = SyncNamesError;
    fn from_str(text: &str) -> Result<SyncNames, SyncNamesError> {
        let foreign = || SyncNamesError(text.to_owned());
        if text.is_empty() {
            return Ok(SyncNames::Empty);
        }
        if text == SyncNames::Nobody.to_string() {
            return Ok(SyncNames::Nobody);
        }
        let (needed, names) = text
            .strip_prefix("ANY ")
            .and_then(|rest| rest.strip_suffix(')'))
            .and_then(|rest| rest.split_once(" ("))
            .ok_or_else(foreign)?;
        let streams: Option<Vec<Stream>> =
            names.split(", ").map(|name| name.strip_prefix('"')?.strip_suffix('"')?.parse().ok()).collect();
        match (needed.parse(), streams) {
            (Ok(needed), Some(streams)) if needed > 0 => Ok(SyncNames::Any { needed, streams }),
            _ => Err(foreign()),
        }
    }
}

/// From whom a standby streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Named in the certificate that the upstream must show.
    pub node: NodeName,
    pub address: IpAddr,
    pub port: u16,
    /// Who we are: named by the slot that is ours on the upstream, and in `application_name`.
    pub member: Member,
    /// The timeline that was adopted, under which a primary counts us. `None` where nobody is to count us and no slot
    /// is ours, such as at a sealed copy that we take some WAL from.
    pub adopted: Option<Timeline>,
}

impl Upstream {
    fn application_name(&self) -> String {
        let member = self.member.clone();
        match self.adopted {
            Some(timeline) => Stream { member, timeline }.to_string(),
            None => member.to_string(),
        }
    }
}

/// What `pgherd.conf` says.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Managed {
    pub synchronous_standby_names: SyncNames,
    /// Empty: connects to nobody.
    pub primary_conninfo: String,
    pub primary_slot_name: String,
    pub restore_command: String,
}

impl Managed {
    pub(super) fn text(&self) -> String {
        let mut text = String::from("# Written by pgherd; changes by itself while PostgreSQL runs.\n");
        for (name, value) in [
            ("synchronous_standby_names", self.synchronous_standby_names.to_string()),
            ("primary_conninfo", self.primary_conninfo.clone()),
            ("primary_slot_name", self.primary_slot_name.clone()),
            ("restore_command", self.restore_command.clone()),
        ] {
            writeln!(text, "{name} = {}", quoted(&value)).expect("a String takes any text");
        }
        text
    }

    /// Connects to nobody and fetches nothing; the list stays.
    pub(crate) fn sealed(self) -> Managed {
        Managed { synchronous_standby_names: self.synchronous_standby_names, ..Managed::default() }
    }

    /// Points it at an upstream.
    pub(crate) fn following(self, instance: &Instance, upstream: &Upstream) -> Managed {
        Managed {
            primary_conninfo: conninfo(instance, upstream),
            primary_slot_name: upstream.adopted.map(|_| slot_name(&upstream.member)).unwrap_or_default(),
            ..self
        }
    }
}

/// A member's slot carries its name.
pub fn slot_name(member: &Member) -> String {
    member.to_string()
}

/// A server as libpq is to reach it. No password: that is in the passfile.
pub(crate) struct Conninfo<'a> {
    /// What the certificate must name.
    pub(crate) host: &'a str,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) user: &'a str,
    pub(crate) application_name: &'a str,
    /// `None` for physical replication.
    pub(crate) database: Option<&'a str>,
    pub(crate) passfile: &'a Path,
    pub(crate) tls: &'a TlsFiles,
}

fn conninfo(instance: &Instance, upstream: &Upstream) -> String {
    Conninfo {
        host: upstream.node.as_str(),
        address: upstream.address,
        port: upstream.port,
        user: crate::roles::REPLICATION,
        application_name: &upstream.application_name(),
        database: None,
        passfile: &instance.passfile(),
        tls: &instance.tls,
    }
    .to_string()
}

impl fmt::Display for Conninfo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl Conninfo<'_> {
    fn text(&self) -> String {
        let tls = self.tls;
        let mut text = String::new();
        let database = self.database.map(|database| ("dbname", database.to_owned()));
        for (name, value) in [
            ("host", self.host.to_owned()),
            ("hostaddr", self.address.to_string()),
            ("port", self.port.to_string()),
            ("user", self.user.to_owned()),
            ("passfile", self.passfile.display().to_string()),
            ("application_name", self.application_name.to_owned()),
            ("sslmode", "verify-full".to_owned()),
            ("sslrootcert", tls.ca.display().to_string()),
            ("sslcert", tls.cert.display().to_string()),
            ("sslkey", tls.key.display().to_string()),
            ("gssencmode", "disable".to_owned()),
            ("channel_binding", "prefer".to_owned()),
            // A cut that swallows packets is noticed within some seconds, not after the kernel's two hours.
            ("connect_timeout", "3".to_owned()),
            ("keepalives_idle", "2".to_owned()),
            ("keepalives_interval", "1".to_owned()),
            ("keepalives_count", "3".to_owned()),
            ("tcp_user_timeout", "5000".to_owned()),
        ]
        .into_iter()
        .chain(database)
        {
            let space = if text.is_empty() { "" } else { " " };
            write!(text, "{space}{name}={}", conninfo_value(&value)).expect("a String takes any text");
        }
        text
    }
}

/// A line of a passfile that gives `user` its password on any server.
pub(crate) fn passfile_line(user: &str, password: &Secret) -> String {
    let escaped = password.reveal().replace('\\', "\\\\").replace(':', "\\:");
    format!("*:*:*:{user}:{escaped}\n")
}

fn conninfo_value(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/:".contains(&byte);
    if !value.is_empty() && value.bytes().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

pub(crate) fn read_blocking(instance: &Instance) -> Result<Managed> {
    let path = instance.data_dir.join(MANAGED_CONF);
    let Some(text) = durable::read_text(&path)? else { return Ok(Managed::default()) };
    let mut found = parse(&text);
    let mut take = |name: &str| found.remove(name).unwrap_or_default();
    let names = take("synchronous_standby_names");
    Ok(Managed {
        // A file that somebody edited: every commit waits rather than none.
        synchronous_standby_names: names.parse().unwrap_or(SyncNames::Nobody),
        primary_conninfo: take("primary_conninfo"),
        primary_slot_name: take("primary_slot_name"),
        restore_command: take("restore_command"),
    })
}

pub(crate) fn write_blocking(instance: &Instance, managed: &Managed) -> Result<bool> {
    durable::write_if_changed(
        &instance.data_dir.join(MANAGED_CONF),
        managed.text().as_bytes(),
        durable::PRIVATE,
    )
}

/// The same for a caller that syncs the directory itself.
pub(crate) fn replace_blocking(instance: &Instance, managed: &Managed) -> Result<()> {
    durable::replace(&instance.data_dir.join(MANAGED_CONF), managed.text().as_bytes(), durable::PRIVATE)
}

/// The same for what need not outlive the machine's present run.
pub(crate) fn put_blocking(instance: &Instance, managed: &Managed) -> Result<()> {
    durable::put(&instance.data_dir.join(MANAGED_CONF), managed.text().as_bytes(), durable::PRIVATE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_read_back_as_it_was_written_and_a_foreign_one_is_not() {
        let streams = vec!["b_7.3".parse().unwrap(), "node_c_3.12".parse().unwrap()];
        for names in [SyncNames::Empty, SyncNames::Nobody, SyncNames::Any { needed: 2, streams }] {
            assert_eq!(names.to_string().parse(), Ok(names));
        }
        let others = ["*", "b", "ANY 1 (*)", "FIRST 1 (\"b_7.3\")", "ANY 0 (\"b_7.3\")", "ANY 1 (\"b_7\")"];
        for foreign in others {
            assert!(foreign.parse::<SyncNames>().is_err(), "{foreign}");
        }
        let empty = SyncNames::Any { needed: 1, streams: vec![] };
        assert_eq!(empty.to_string(), SyncNames::Nobody.to_string(), "a list of no one lets nobody pass");
    }

    #[test]
    fn nobody_cannot_be_anybody() {
        assert!(NOBODY.len() > 63);
        assert!(NOBODY.parse::<Stream>().is_err());
    }

    #[test]
    fn values_in_a_connection_string() {
        assert_eq!(conninfo_value("/herd/a"), "/herd/a");
        assert_eq!(conninfo_value(""), "''");
        assert_eq!(conninfo_value(r"it's \ here"), r"'it\'s \\ here'");
    }
}
