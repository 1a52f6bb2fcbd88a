//! The configuration of a restored copy: what would let it archive into, stream from or wait for those of the original
//! is taken out, and recovery gets its settings.
//!
//! Lines are commented out where they stand, in the files that PostgreSQL reads from the data directory; what is set anew
//! comes at the end of `postgresql.auto.conf`, which wins. What leads out of the data directory is named and left: only
//! whoever runs the copy knows what is there.
//!
//! Leaves out: files outside of the data directory. Hazard: a copy that archives into the original's place, or is counted
//! among its standbys.

use std::collections::BTreeMap;

use pgherd_core::types::{Lsn, Timeline};

use crate::conf::{self, AUTO_CONF, CONF, quoted};
use crate::control::Limits;

/// Before a line that was taken out.
const TAKEN_OUT: &[u8] = b"#pgherd# ";
/// Files that include each other, at most.
const MAX_FILES: usize = 64;

/// Settings that connect a server with others, or say how it recovers.
const STRIPPED: [&str; 20] = [
    "archive_cleanup_command",
    "archive_command",
    "archive_library",
    "archive_mode",
    "data_directory",
    "external_pid_file",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    // Recovery would wait as long before each commit.
    "recovery_min_apply_delay",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restore_command",
];
/// Commits would wait for standbys of the original.
const NAMES: &str = "synchronous_standby_names";
/// Its value can hold a password.
const SECRET: &str = "primary_conninfo";

/// In a file that pgherd has written: what belongs to one node of a herd and to its host. Neither need be there any more, its certificates for
/// one; and whoever connects to its address or socket does not mean a copy.
const OF_NODE: [&str; 11] = [
    "cluster_name",
    "listen_addresses",
    "log_directory",
    "port",
    "ssl",
    "ssl_ca_file",
    "ssl_cert_file",
    "ssl_crl_file",
    "ssl_key_file",
    "unix_socket_directories",
    "unix_socket_permissions",
];
/// The first words of such a file.
const MANAGED: &[u8] = b"# Written by pgherd";

/// Settings that name places.
const PLACES: [&str; 11] = [
    "hba_file",
    "ident_file",
    "include",
    "include_dir",
    "include_if_exists",
    "log_directory",
    "ssl_ca_file",
    "ssl_cert_file",
    "ssl_crl_file",
    "ssl_key_file",
    "unix_socket_directories",
];

/// How a restored copy recovers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// As PostgreSQL runs it, with `%f` and `%p`.
    pub restore_command: String,
    pub end: End,
    pub timeline: FollowTimeline,
    /// What happens at the end, unless that is the end of all WAL.
    pub action: Action,
    pub come: Come,
}

/// Where recovery ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With the last WAL that there is.
    Latest,
    /// As soon as the copy is consistent.
    Immediate,
    Lsn {
        at: Lsn,
        inclusive: bool,
    },
    /// A time with its zone, as PostgreSQL reads it.
    Time {
        at: String,
        inclusive: bool,
    },
    Xid {
        xid: u64,
        inclusive: bool,
    },
    /// A restore point.
    Name(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FollowTimeline {
    Latest,
    /// That of the backup.
    Current,
    Number(Timeline),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Pause,
    Promote,
    Shutdown,
}

/// What it comes up as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Come {
    /// A primary on a timeline of its own, when recovery has ended.
    Primary,
    /// A standby.
    Standby,
    /// A member of a herd, which its agent configures and starts. Its control file stays as it was: an agent reads it to find the
    /// end of its WAL before PostgreSQL has run, and nobody takes its `backup_label` away.
    Member,
}

impl Come {
    pub(super) fn signal(self) -> &'static str {
        match self {
            Come::Primary => "recovery.signal",
            Come::Standby | Come::Member => "standby.signal",
        }
    }
}

impl Recovery {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("restore_command", self.restore_command.clone())];
        let inclusive = |inclusive: bool| ("recovery_target_inclusive", inclusive.to_string());
        match &self.end {
            End::Latest => {}
            End::Immediate => lines.push(("recovery_target", "immediate".to_owned())),
            End::Lsn { at, inclusive: whether } => {
                lines.extend([("recovery_target_lsn", at.to_string()), inclusive(*whether)]);
            }
            End::Time { at, inclusive: whether } => {
                lines.extend([("recovery_target_time", at.clone()), inclusive(*whether)]);
            }
            End::Xid { xid, inclusive: whether } => {
                lines.extend([("recovery_target_xid", xid.to_string()), inclusive(*whether)]);
            }
            End::Name(name) => lines.push(("recovery_target_name", name.clone())),
        }
        let timeline = match self.timeline {
            FollowTimeline::Latest => "latest".to_owned(),
            FollowTimeline::Current => "current".to_owned(),
            FollowTimeline::Number(timeline) => timeline.to_string(),
        };
        lines.push(("recovery_target_timeline", timeline));
        if self.end != End::Latest {
            let action = match self.action {
                Action::Pause => "pause",
                Action::Promote => "promote",
                Action::Shutdown => "shutdown",
            };
            lines.push(("recovery_target_action", action.to_owned()));
        }
        lines
    }
}

/// A setting that a restore changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub file: String,
    pub name: String,
    /// What it was; not told of what can hold a password.
    pub was: Option<String>,
    /// What it is set to; none where it is taken out.
    pub now: Option<String>,
}

/// What becomes of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Configuration {
    /// Files that are different then, with their new content.
    pub files: BTreeMap<String, Vec<u8>>,
    pub changes: Vec<Change>,
    /// Settings that lead out of the data directory and stay: file, name and value.
    pub outside: Vec<(String, String, String)>,
}

impl Configuration {
    /// The files that PostgreSQL reads from a data directory. The rest are [`Configuration::included`] in them.
    pub fn first() -> Vec<String> {
        vec![CONF.to_owned(), AUTO_CONF.to_owned()]
    }

    /// The files inside of the data directory that this one includes.
    pub fn included(text: &[u8]) -> Vec<String> {
        let included = lines(text).filter_map(|(_, setting)| setting);
        let inside = included
            .filter(|(name, value)| name.starts_with("include") && name != "include_dir" && !leads_out(value))
            .map(|(_, value)| value);
        inside.take(MAX_FILES).collect()
    }
}

/// What becomes of these files, by their names from the data directory. Both of [`Configuration::first`] may be missing.
pub fn adapt(files: &BTreeMap<String, Vec<u8>>, recovery: &Recovery, at_least: Limits) -> Configuration {
    let mut adapted = Configuration::default();
    let mut effective: BTreeMap<String, String> = BTreeMap::new();
    // The one that wins comes last.
    let last = files.get_key_value(AUTO_CONF);
    for (file, text) in files.iter().filter(|(name, _)| *name != AUTO_CONF).chain(last) {
        let mut out = Vec::with_capacity(text.len());
        let mut changed = false;
        let of_node = |name: &str| text.starts_with(MANAGED) && OF_NODE.contains(&name);
        for (line, setting) in lines(text) {
            if let Some((name, value)) = setting {
                if STRIPPED.contains(&name.as_str()) || name == NAMES || of_node(&name) {
                    out.extend_from_slice(TAKEN_OUT);
                    changed = true;
                    if !value.is_empty() {
                        let was = (name != SECRET).then_some(value);
                        adapted.changes.push(Change { file: file.clone(), name, was, now: None });
                    }
                } else {
                    if PLACES.contains(&name.as_str()) && leads_out(&value) {
                        adapted.outside.push((file.clone(), name.clone(), value.clone()));
                    }
                    effective.insert(name, value);
                }
            }
            out.extend_from_slice(line);
        }
        if changed {
            adapted.files.insert(file.clone(), out);
        }
    }
    let mut set = recovery.lines();
    // Neither into the original's archive nor, where nothing takes it, into a `pg_wal` that grows for ever.
    set.push(("archive_mode", "off".to_owned()));
    for (name, least) in at_least.named() {
        let found = effective.get(name);
        let number = found.and_then(|value| value.parse().ok()).or_else(|| default_limit(name)).unwrap_or(0);
        if number < least {
            set.push((name, least.to_string()));
        }
    }
    let auto = adapted.files.remove(AUTO_CONF).or_else(|| files.get(AUTO_CONF).cloned()).unwrap_or_default();
    let mut auto = auto;
    if !auto.is_empty() && !auto.ends_with(b"\n") {
        auto.push(b'\n');
    }
    auto.extend_from_slice(b"# Set by pgherd when this copy was restored.\n");
    for (name, value) in set {
        auto.extend_from_slice(format!("{name} = {}\n", quoted(&value)).as_bytes());
        let was = effective.get(name).cloned();
        adapted.changes.push(Change {
            file: AUTO_CONF.to_owned(),
            name: name.to_owned(),
            was,
            now: Some(value),
        });
    }
    adapted.files.insert(AUTO_CONF.to_owned(), auto);
    adapted
}

/// PostgreSQL's own defaults of what recovery must not go below.
fn default_limit(name: &str) -> Option<u32> {
    conf::default_limit(name).or(match name {
        "max_connections" => Some(100),
        "max_wal_senders" => Some(10),
        _ => None,
    })
}

fn leads_out(value: &str) -> bool {
    value
        .split(',')
        .any(|path| path.trim().starts_with('/') || path.split('/').any(|part| part.trim() == ".."))
}

/// Each line with its end, and the setting in it.
fn lines(text: &[u8]) -> impl Iterator<Item = (&[u8], Option<(String, String)>)> {
    text.split_inclusive(|byte| *byte == b'\n').map(|line| {
        let setting = conf::parse(&String::from_utf8_lossy(line)).into_iter().next();
        (line, setting)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recovery(end: End) -> Recovery {
        Recovery {
            restore_command: "pgherd wal fetch %f '%p'".to_owned(),
            end,
            timeline: FollowTimeline::Latest,
            action: Action::Pause,
            come: Come::Primary,
        }
    }

    const LIMITS: Limits = Limits {
        max_connections: 300,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_transactions: 2,
        max_locks_per_transaction: 64,
    };

    fn text(adapted: &Configuration, file: &str) -> String {
        String::from_utf8(adapted.files[file].clone()).unwrap()
    }

    #[test]
    fn case_26_what_connects_a_copy_with_the_original_is_taken_out_of_every_file() {
        let files = BTreeMap::from([
            (
                CONF.to_owned(),
                b"archive_mode = on # as ever\nArchive_Command 'cp %p /archive/%f'\nwork_mem = 8MB\n\
                  data_directory='/srv/original'\ninclude 'pgherd.conf'\nhba_file = '/etc/pg/hba'\n# archive_mode = on\n"
                    .to_vec(),
            ),
            (
                "pgherd.conf".to_owned(),
                b"primary_conninfo = 'host=a password=geheim'\nprimary_slot_name = ''\nsynchronous_standby_names='*'"
                    .to_vec(),
            ),
            (AUTO_CONF.to_owned(), b"work_mem = '16MB'\nrecovery_target_xid = '7'\nmax_connections = '100'".to_vec()),
        ]);
        let adapted = adapt(&files, &recovery(End::Lsn { at: Lsn(0x2A), inclusive: false }), LIMITS);
        assert_eq!(
            text(&adapted, CONF),
            "#pgherd# archive_mode = on # as ever\n#pgherd# Archive_Command 'cp %p /archive/%f'\nwork_mem = 8MB\n\
             #pgherd# data_directory='/srv/original'\ninclude 'pgherd.conf'\nhba_file = '/etc/pg/hba'\n# archive_mode = on\n"
        );
        let managed = text(&adapted, "pgherd.conf");
        assert!(managed.lines().all(|line| line.starts_with("#pgherd# ")), "{managed}");
        assert_eq!(
            text(&adapted, AUTO_CONF),
            "work_mem = '16MB'\n#pgherd# recovery_target_xid = '7'\nmax_connections = '100'\n\
             # Set by pgherd when this copy was restored.\nrestore_command = 'pgherd wal fetch %f ''%p'''\n\
             recovery_target_lsn = '0/2A'\nrecovery_target_inclusive = 'false'\nrecovery_target_timeline = 'latest'\n\
             recovery_target_action = 'pause'\narchive_mode = 'off'\nmax_connections = '300'\n\
             max_prepared_transactions = '2'\n"
        );
        assert_eq!(adapted.outside, [(CONF.to_owned(), "hba_file".to_owned(), "/etc/pg/hba".to_owned())]);
        let change = |name: &str| adapted.changes.iter().find(|change| change.name == name).cloned().unwrap();
        assert_eq!(change("archive_command").was.as_deref(), Some("cp %p /archive/%f"));
        assert_eq!(change("max_connections").was.as_deref(), Some("100"));
        assert!(!format!("{:?}", adapted.changes).contains("geheim"));
        assert!(
            !adapted.changes.iter().any(|change| change.name == "primary_slot_name"),
            "nothing was changed by it"
        );

        // Done to what it has made, it changes nothing but what is set anew.
        let mut again = files;
        again.extend(adapted.files.clone());
        let twice = adapt(&again, &recovery(End::Latest), LIMITS);
        assert!(!twice.files.contains_key(CONF) && !twice.files.contains_key("pgherd.conf"));
    }

    #[test]
    fn a_copy_of_a_herds_node_needs_nothing_of_that_node() {
        let conf = |first: &str| {
            let text = format!(
                "{first}\nssl = 'on'\nssl_cert_file = '/srv/a/node.pem'\nport = '21000'\nwork_mem = '8MB'\n"
            );
            BTreeMap::from([(CONF.to_owned(), text.into_bytes())])
        };
        let adapted = adapt(&conf("# Written by pgherd, whole"), &recovery(End::Latest), LIMITS);
        assert_eq!(
            text(&adapted, CONF),
            "# Written by pgherd, whole\n#pgherd# ssl = 'on'\n#pgherd# ssl_cert_file = '/srv/a/node.pem'\n\
             #pgherd# port = '21000'\nwork_mem = '8MB'\n"
        );
        assert!(adapted.outside.is_empty() && adapted.changes.iter().any(|change| change.name == "port"));
        let own = adapt(&conf("# By hand"), &recovery(End::Latest), LIMITS);
        assert!(
            !own.files.contains_key(CONF) && own.outside.len() == 1,
            "what a person wrote stays, and is named"
        );
    }

    #[test]
    fn files_inside_of_the_data_directory_are_read_and_others_are_named() {
        let text = b"include 'pgherd.conf'\ninclude_if_exists = extra.conf\ninclude '/etc/x'\ninclude_dir 'conf.d'\n";
        assert_eq!(Configuration::included(text), ["pgherd.conf", "extra.conf"]);
    }
}
