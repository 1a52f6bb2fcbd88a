//! PostgreSQL's configuration: all of `postgresql.conf` from the herd file and what safety needs, and the few
//! settings that change while it runs in a file of their own.
//!
//! - On the command line: what nobody may change, `ALTER SYSTEM` included (`on_the_command_line`).
//! - `postgresql.conf`: rewritten whole ([`write()`]), after PostgreSQL itself has found no fault in it
//!   ([`validate`]).
//! - `pgherd.conf`, included last: upstream, slot, restore command and the synchronous list ([`Managed`]).
//! - `postgresql.auto.conf` belongs to `ALTER SYSTEM` and wins over both files: what it overrides is reported
//!   ([`overrides`]), never silently undone, except by a seal for the three settings that a seal is about.
//!
//! Leaves out: which upstream and which list. Hazard: a synchronous list that is written and not in force
//! acknowledges commits that nobody holds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::control::Limits;
use crate::durable;
use crate::error::{Error, Result, blocking, within};
use crate::instance::Instance;
use crate::logs;

mod managed;

pub(crate) use managed::{
    Conninfo, passfile_line, put_blocking, read_blocking, replace_blocking, write_blocking,
};
pub use managed::{Managed, SyncNames, SyncNamesError, Upstream, slot_name};

const FILES: Duration = Duration::from_secs(10);
const VALIDATION: Duration = Duration::from_secs(20);

pub const CONF: &str = "postgresql.conf";
pub const MANAGED_CONF: &str = "pgherd.conf";
pub const AUTO_CONF: &str = "postgresql.auto.conf";

/// WAL that is kept for standbys without a slot's help.
const WAL_KEEP_SIZE: &str = "1GB";
/// Standbys, their clones (two connections each), backup, and somebody's tool.
const MIN_WAL_SENDERS: u32 = 16;
const MIN_REPLICATION_SLOTS: u32 = 16;
/// A connection that is dead is noticed by both its ends within this.
const REPLICATION_TIMEOUT: &str = "10s";
const LOG_FILE_MAX: &str = "64MB";

/// Between these, a slot may hold back a quarter of the WAL volume.
const SLOT_CAP_MIN_BYTES: u64 = 1 << 30;
const SLOT_CAP_MAX_BYTES: u64 = 64 << 30;

/// What the operator and the agent decide about `postgresql.conf`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Settings {
    /// From the herd file: names and values as `postgresql.conf` takes them, without quotes.
    pub parameters: BTreeMap<String, String>,
    /// A delayed standby: it applies this long after the primary has committed, and sends no feedback.
    pub apply_delay: Option<Duration>,
    /// See [`slot_cap_bytes`]; never less than its least.
    pub max_slot_wal_keep_bytes: u64,
    /// What the data directory's primary had; a standby with less refuses to start. `None` before initdb.
    pub at_least: Option<Limits>,
    pub data_checksums: bool,
    /// It listens on addresses that are not here yet, so on all there are.
    pub every_address: bool,
}

/// A setting that was raised because a standby may not have less than its primary had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raised {
    pub name: &'static str,
    pub asked: u32,
    pub kept: u32,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfError {
    #[error("{name} is set by pgherd")]
    Reserved { name: String },

    #[error("{name} = {value} is unsafe: {why}")]
    Unsafe { name: String, value: String, why: &'static str },

    #[error("\"{name}\" is not the name of a parameter")]
    BadName { name: String },

    #[error("PostgreSQL does not accept the configuration: {}", .complaints.join("; "))]
    Rejected { complaints: Vec<String> },

    #[error(transparent)]
    Other(#[from] Error),
}

impl ConfError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            ConfError::Reserved { .. } => Some("take it out of the herd file's parameters"),
            ConfError::Rejected { .. } => {
                Some("names and values are those of postgresql.conf, without quotes")
            }
            ConfError::Other(error) => error.hint(),
            _ => None,
        }
    }
}

/// What nobody may change while it runs: it wins over every file, `ALTER SYSTEM` included.
pub(crate) fn on_the_command_line(instance: &Instance) -> Vec<(&'static str, String)> {
    let in_data_dir = |name: &str| instance.data_dir.join(name).display().to_string();
    vec![
        // Else PostgreSQL comes back as a primary by itself after a backend crashed (S5).
        ("restart_after_crash", "off".into()),
        ("recovery_target_timeline", "latest".into()),
        ("hot_standby", "on".into()),
        ("fsync", "on".into()),
        ("full_page_writes", "on".into()),
        // A failed fsync that is tried again succeeds, and the data is gone.
        ("data_sync_retry", "off".into()),
        // The seal finds WAL receivers by their titles.
        ("update_process_title", "on".into()),
        ("hba_file", in_data_dir("pg_hba.conf")),
        ("ident_file", in_data_dir("pg_ident.conf")),
    ]
}

/// Parameters that pgherd sets, so that a herd file which names one is wrong.
const RESERVED: [&str; 46] = [
    "archive_cleanup_command",
    "cluster_name",
    "config_file",
    "data_directory",
    "data_sync_retry",
    "external_pid_file",
    "fsync",
    "full_page_writes",
    "hba_file",
    "hot_standby",
    "ident_file",
    "ignore_invalid_pages",
    "include",
    "include_dir",
    "include_if_exists",
    "lc_messages",
    "listen_addresses",
    "log_destination",
    "log_directory",
    "log_file_mode",
    "log_filename",
    "log_truncate_on_rotation",
    "logging_collector",
    "password_encryption",
    "port",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restart_after_crash",
    "restore_command",
    "ssl",
    "synchronous_standby_names",
    "unix_socket_directories",
    "update_process_title",
    "wal_receiver_create_temp_slot",
    "zero_damaged_pages",
];

/// Reserved as well, by their beginning.
const RESERVED_PREFIXES: [&str; 1] = ["ssl_"];

/// Of `ssl_…`, what an operator may choose.
const OPERATORS_SSL: [&str; 6] = [
    "ssl_ciphers",
    "ssl_tls13_ciphers",
    "ssl_ecdh_curve",
    "ssl_groups",
    "ssl_prefer_server_ciphers",
    "ssl_min_protocol_version",
];

/// Refuses what the herd file may not set. Needs no PostgreSQL.
pub fn check_parameters(parameters: &BTreeMap<String, String>) -> Vec<ConfError> {
    let mut wrong = Vec::new();
    for (name, value) in parameters {
        let lower = name.to_ascii_lowercase();
        let spelt =
            lower.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$'));
        if lower.is_empty() || !spelt || value.contains(['\n', '\r', '\0']) {
            wrong.push(ConfError::BadName { name: name.clone() });
            continue;
        }
        let reserved_ssl = RESERVED_PREFIXES.iter().any(|prefix| lower.starts_with(prefix));
        if RESERVED.contains(&lower.as_str()) || (reserved_ssl && !OPERATORS_SSL.contains(&lower.as_str())) {
            wrong.push(ConfError::Reserved { name: name.clone() });
        }
        let said = value.trim().to_ascii_lowercase();
        let why = match lower.as_str() {
            "synchronous_commit"
                if !matches!(said.as_str(), "on" | "remote_apply" | "true" | "yes" | "1") =>
            {
                "commits would be acknowledged before a voter has flushed them; lower it in single sessions"
            }
            "client_min_messages" if matches!(said.as_str(), "error" | "fatal" | "panic") => {
                "the warning that a commit was not replicated would not be sent"
            }
            "wal_level" if said == "minimal" => "standbys need at least replica",
            _ => continue,
        };
        wrong.push(ConfError::Unsafe { name: name.clone(), value: value.clone(), why });
    }
    wrong
}

/// The cap for slots on a WAL volume of this size.
pub fn slot_cap_bytes(volume_bytes: u64) -> u64 {
    (volume_bytes / 4).clamp(SLOT_CAP_MIN_BYTES, SLOT_CAP_MAX_BYTES)
}

/// Writes `postgresql.conf` if it changed, after PostgreSQL accepted it. `true`: it changed, reload or restart.
pub async fn write(instance: &Instance, settings: &Settings) -> Result<(bool, Vec<Raised>), ConfError> {
    write_into(instance, settings, &instance.data_dir).await
}

/// The same for a data directory that is still being made.
pub(crate) async fn write_into(
    instance: &Instance,
    settings: &Settings,
    data_dir: &Path,
) -> Result<(bool, Vec<Raised>), ConfError> {
    let (text, raised) = generate(instance, settings)?;
    let path = data_dir.join(CONF);
    let managed = data_dir.join(MANAGED_CONF);
    let unchanged = {
        let (path, text) = (path.clone(), text.clone());
        blocking("reading postgresql.conf", FILES, move || {
            if !managed.exists() {
                durable::write(&managed, Managed::default().text().as_bytes(), durable::PRIVATE)?;
            }
            Ok::<_, Error>(durable::read_text(&path)? == Some(text))
        })
        .await?
    };
    if unchanged {
        return Ok((false, raised));
    }
    validate(instance, &text).await?;
    blocking("writing postgresql.conf", FILES, move || {
        durable::write(&path, text.as_bytes(), durable::PRIVATE)
    })
    .await?;
    Ok((true, raised))
}

/// Has PostgreSQL itself judge a configuration, without a server or a data directory: unknown names, wrong units,
/// values out of range.
pub async fn validate(instance: &Instance, text: &str) -> Result<(), ConfError> {
    let dir = instance.private_dir.join("candidate");
    let program = instance.installation.program("postgres");
    {
        let (dir, text) = (dir.clone(), text.to_owned());
        blocking("writing a configuration to be checked", FILES, move || {
            durable::create_private_dir(&dir)?;
            durable::write(&dir.join(MANAGED_CONF), Managed::default().text().as_bytes(), durable::PRIVATE)?;
            durable::write(&dir.join(CONF), text.as_bytes(), durable::PRIVATE)
        })
        .await?;
    }
    let mut command = tokio::process::Command::new(&program);
    command
        .arg("-D")
        .arg(&dir)
        .args(["-C", "port"])
        .env_clear()
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = within("checking the configuration", VALIDATION, async {
        command.output().await.map_err(Error::io("run", &program))
    })
    .await?;
    if output.status.success() {
        return Ok(());
    }
    let complaints = complaints(&String::from_utf8_lossy(&output.stderr));
    Err(ConfError::Rejected { complaints })
}

/// PostgreSQL's own sentences, without its prefixes and without the path of the candidate.
fn complaints(stderr: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in stderr.lines() {
        let Some((_, message)) = ["LOG:  ", "FATAL:  ", "ERROR:  ", "HINT:  ", "postgres: "]
            .iter()
            .find_map(|prefix| line.split_once(prefix))
        else {
            continue;
        };
        let message = message.split(" in file \"").next().unwrap_or(message);
        if !message.starts_with("configuration file") {
            found.push(message.to_owned());
        }
    }
    if found.is_empty() {
        found.push(stderr.trim().to_owned());
    }
    found
}

/// The whole of `postgresql.conf`.
pub fn generate(instance: &Instance, settings: &Settings) -> Result<(String, Vec<Raised>), ConfError> {
    if let Some(wrong) = check_parameters(&settings.parameters).into_iter().next() {
        return Err(wrong);
    }
    let asked: BTreeMap<String, &str> =
        settings.parameters.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.as_str())).collect();
    let mut lines: BTreeMap<String, String> =
        asked.iter().map(|(name, value)| (name.clone(), (*value).to_owned())).collect();
    let default = |lines: &mut BTreeMap<String, String>, name: &str, value: &str| {
        lines.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    };

    for (name, value) in [
        ("max_connections", "100"),
        ("shared_buffers", "128MB"),
        ("dynamic_shared_memory_type", "posix"),
        ("max_wal_size", "1GB"),
        ("min_wal_size", "80MB"),
        ("wal_level", "replica"),
        ("synchronous_commit", "on"),
        ("client_min_messages", "notice"),
        ("wal_keep_size", WAL_KEEP_SIZE),
        ("hot_standby_feedback", "on"),
        ("wal_sender_timeout", REPLICATION_TIMEOUT),
        ("wal_receiver_timeout", REPLICATION_TIMEOUT),
        ("wal_receiver_status_interval", "1s"),
        // PostgreSQL sleeps this long before it tries a lost upstream again: it is part of every outage.
        ("wal_retrieve_retry_interval", "100ms"),
        ("log_line_prefix", "%m [%p] %q%u@%d %a "),
        ("log_timezone", "UTC"),
        ("log_checkpoints", "on"),
        ("log_lock_waits", "on"),
        ("log_rotation_age", "1d"),
        ("log_rotation_size", LOG_FILE_MAX),
        ("ssl_min_protocol_version", "TLSv1.2"),
    ] {
        default(&mut lines, name, value);
    }

    let path = |path: &Path| path.display().to_string();
    let mut set = |name: &str, value: String| lines.insert(name.to_owned(), value);
    set("cluster_name", instance.node.to_string());
    set(
        "listen_addresses",
        if settings.every_address { "*".to_owned() } else { instance.listen_addresses.join(",") },
    );
    set("port", instance.port.to_string());
    set("unix_socket_directories", path(&instance.socket_dir));
    set("ssl", "on".into());
    set("ssl_cert_file", path(&instance.tls.cert));
    set("ssl_key_file", path(&instance.tls.key));
    set("ssl_ca_file", path(&instance.tls.ca));
    set("password_encryption", "scram-sha-256".into());
    set(
        "max_slot_wal_keep_size",
        format!("{}MB", settings.max_slot_wal_keep_bytes.max(SLOT_CAP_MIN_BYTES) >> 20),
    );
    set("wal_log_hints", if settings.data_checksums { "off" } else { "on" }.into());
    set("wal_receiver_create_temp_slot", "off".into());
    // PostgreSQL is read by this program, too.
    set("lc_messages", "C".into());
    set("log_destination", "stderr".into());
    set("logging_collector", "on".into());
    set("log_directory", path(&instance.log_dir));
    set("log_filename", format!("{}%Y%m%d_%H%M%S.log", logs::PREFIX));
    set("log_truncate_on_rotation", "off".into());
    set("log_file_mode", "0600".into());
    if let Some(delay) = settings.apply_delay {
        set("recovery_min_apply_delay", format!("{}ms", delay.as_millis()));
        // Its snapshots are old by the whole delay, and would keep the primary from cleaning up as long.
        set("hot_standby_feedback", "off".into());
    }

    let mut raised = Vec::new();
    let floors = [("max_wal_senders", MIN_WAL_SENDERS), ("max_replication_slots", MIN_REPLICATION_SLOTS)];
    for (name, floor) in floors {
        let number = lines.get(name).and_then(|value| value.parse().ok()).unwrap_or(0);
        lines.insert(name.to_owned(), u32::max(number, floor).to_string());
    }
    for (name, least) in settings.at_least.map(|limits| limits.named()).into_iter().flatten() {
        let Some(number) =
            lines.get(name).and_then(|value| value.parse::<u32>().ok()).or(default_limit(name))
        else {
            continue;
        };
        if number < least {
            lines.insert(name.to_owned(), least.to_string());
            if asked.contains_key(name) {
                raised.push(Raised { name, asked: number, kept: least });
            }
        }
    }

    let mut text = String::from(
        "# Written by pgherd, whole, whenever the herd file changes. Edits here are lost: change the parameters in\n\
         # the herd file and run \"pgherd apply\". ALTER SYSTEM wins over this file, and pgherd reports it.\n\n",
    );
    for (name, value) in &lines {
        writeln!(text, "{name} = {}", quoted(value)).expect("a String takes any text");
    }
    // Missing, it keeps PostgreSQL from starting, which is right: it holds the synchronous list.
    writeln!(text, "\ninclude '{MANAGED_CONF}'").expect("a String takes any text");
    Ok((text, raised))
}

/// PostgreSQL's own defaults of the settings that a standby may not have lower.
pub(crate) fn default_limit(name: &str) -> Option<u32> {
    Some(match name {
        "max_worker_processes" => 8,
        "max_prepared_transactions" => 0,
        "max_locks_per_transaction" => 64,
        _ => return None,
    })
}

/// As a value in a configuration file.
pub(crate) fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// The settings of a configuration file that pgherd or `ALTER SYSTEM` wrote: one a line, quoted, the last one
/// counts.
pub(crate) fn parse(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let end = line.find(|c: char| c.is_whitespace() || c == '=').unwrap_or(line.len());
        let (name, rest) = line.split_at(end);
        let rest = rest.trim_start().strip_prefix('=').unwrap_or(rest).trim();
        found.insert(name.to_ascii_lowercase(), unquoted(rest));
    }
    found
}

fn unquoted(text: &str) -> String {
    let Some(rest) = text.strip_prefix('\'') else {
        return text.split(['#', ' ', '\t']).next().unwrap_or("").to_owned();
    };
    let mut value = String::new();
    let mut chars = rest.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' if chars.peek() == Some(&'\'') => {
                chars.next();
                value.push('\'');
            }
            '\'' => break,
            '\\' => value.extend(chars.next()),
            _ => value.push(c),
        }
    }
    value
}

/// A setting that somebody made with `ALTER SYSTEM` and that wins over pgherd's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    pub name: String,
    pub value: String,
    /// What it would be without; `None` if pgherd's file does not say.
    pub ours: Option<String>,
    /// One that safety rests on: the agent must not go on as if its own value were in force.
    pub critical: bool,
}

/// What a seal and the acknowledgement of commits rest on.
const CRITICAL: [&str; 7] = [
    "primary_conninfo",
    "primary_slot_name",
    "restore_command",
    "synchronous_standby_names",
    "synchronous_commit",
    "client_min_messages",
    "recovery_min_apply_delay",
];

/// Compares `postgresql.auto.conf` with pgherd's files.
pub async fn overrides(instance: &Instance) -> Result<Vec<Override>> {
    let data_dir = instance.data_dir.clone();
    blocking("reading postgresql.auto.conf", FILES, move || {
        let read = |name: &str| Ok::<_, Error>(durable::read_text(&data_dir.join(name))?.unwrap_or_default());
        let mut ours = parse(&read(CONF)?);
        ours.extend(parse(&read(MANAGED_CONF)?));
        let theirs = parse(&read(AUTO_CONF)?);
        let differs = |name: &String, value: &String| ours.get(name) != Some(value);
        let mut found = Vec::new();
        for (name, value) in theirs {
            let critical = CRITICAL.contains(&name.as_str());
            if (critical || ours.contains_key(&name)) && differs(&name, &value) {
                found.push(Override { ours: ours.get(&name).cloned(), name, value, critical });
            }
        }
        Ok(found)
    })
    .await
}

/// True if one of `names` is set to something in `postgresql.auto.conf`. Blocks.
pub(crate) fn auto_conf_sets(instance: &Instance, names: &[&str]) -> Result<bool> {
    let text = durable::read_text(&instance.data_dir.join(AUTO_CONF))?.unwrap_or_default();
    Ok(parse(&text).iter().any(|(name, value)| names.contains(&name.as_str()) && !value.is_empty()))
}

/// Takes settings out of `postgresql.auto.conf`, durably; returns those that were there. Blocks.
pub(crate) fn remove_from_auto_conf(instance: &Instance, names: &[&str]) -> Result<Vec<String>> {
    let path: PathBuf = instance.data_dir.join(AUTO_CONF);
    let Some(text) = durable::read_text(&path)? else { return Ok(Vec::new()) };
    let mut removed = Vec::new();
    let mut kept = String::new();
    for line in text.lines() {
        let found = parse(line).into_keys().next().filter(|name| names.contains(&name.as_str()));
        match found {
            Some(name) => removed.push(name),
            None => {
                kept.push_str(line);
                kept.push('\n');
            }
        }
    }
    if !removed.is_empty() {
        durable::write(&path, kept.as_bytes(), durable::PRIVATE)?;
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_quoting() {
        for value in ["", "plain", "it's", r"back\slash", "ANY 1 (\"b_7\")", "'", r"\'", "# no comment"] {
            let line = format!("name = {}", quoted(value));
            assert_eq!(parse(&line)["name"], value, "{line}");
        }
        assert_eq!(parse("work_mem 64MB # more\n#x = 1\n PORT=5433\n"), {
            BTreeMap::from([
                ("work_mem".to_owned(), "64MB".to_owned()),
                ("port".to_owned(), "5433".to_owned()),
            ])
        });
    }

    #[test]
    fn it_listens_where_its_node_is_or_everywhere() {
        let instance = Instance::new(crate::instance::tests::spec()).unwrap();
        let listens = |every_address| {
            let settings = Settings { every_address, ..Settings::default() };
            parse(&generate(&instance, &settings).unwrap().0)["listen_addresses"].clone()
        };
        assert_eq!(listens(false), "127.0.0.1");
        assert_eq!(listens(true), "*");
    }

    #[test]
    fn what_the_herd_file_may_not_set() {
        let set = |name: &str, value: &str| {
            check_parameters(&BTreeMap::from([(name.to_owned(), value.to_owned())])).into_iter().next()
        };
        assert!(matches!(set("Synchronous_Standby_Names", "*"), Some(ConfError::Reserved { .. })));
        assert!(matches!(set("ssl_key_file", "/x"), Some(ConfError::Reserved { .. })));
        assert!(set("ssl_ciphers", "HIGH").is_none());
        assert!(matches!(set("synchronous_commit", "local"), Some(ConfError::Unsafe { .. })));
        assert!(matches!(set("client_min_messages", "ERROR"), Some(ConfError::Unsafe { .. })));
        assert!(matches!(set("x\ny", "1"), Some(ConfError::BadName { .. })));
        assert!(matches!(set("work_mem", "1MB'\nfsync = off"), Some(ConfError::BadName { .. })));
        assert!(set("pg_stat_statements.max", "100").is_none());
    }

    #[test]
    fn a_quarter_of_the_volume_within_bounds() {
        assert_eq!(slot_cap_bytes(1 << 30), 1 << 30);
        assert_eq!(slot_cap_bytes(40 << 30), 10 << 30);
        assert_eq!(slot_cap_bytes(1 << 50), 64 << 30);
    }

    #[test]
    fn postgresqls_complaints_are_quoted_without_their_wrapping() {
        let stderr = "2026-01-01 10:00:00.000 UTC [1] LOG:  unrecognized configuration parameter \"work_memm\" in file \"/x/c\" line 4\n\
                      2026-01-01 10:00:00.000 UTC [1] FATAL:  configuration file \"/x/c\" contains errors\n";
        assert_eq!(complaints(stderr), ["unrecognized configuration parameter \"work_memm\""]);
    }
}
