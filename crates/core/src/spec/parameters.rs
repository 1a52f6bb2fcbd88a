//! PostgreSQL's settings: which exist, what they take, when they take effect, and which are not the operator's.
//!
//! A setting that PostgreSQL would refuse is refused here, because a server that refuses its configuration
//! file does not start, and the operator would learn it in the next failover. What extensions define (a name
//! with a dot) is taken as it is.
//!
//! Hazard: a setting that pgherd manages and the operator could set too has two owners; with
//! `synchronous_standby_names` or `fsync` that loses acknowledged commits.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::OnceLock;

use super::nearest::nearest;

/// PostgreSQL's majors that this program runs.
pub const VERSIONS: RangeInclusive<u16> = 14..=18;

/// A standby that has less of one of these than its primary stops recovering, or does not start.
pub const AT_LEAST_THE_PRIMARYS: [&str; 5] = [
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
];

/// WAL senders and replication slots are never fewer: each node needs one of both on every other, a clone two
/// senders more, and a backup or somebody's tool its own.
pub const MIN_SENDERS_AND_SLOTS: u64 = 16;

/// The least that pgherd uses whatever the file says; a smaller number is raised to it.
pub fn floor(name: &str) -> Option<u64> {
    matches!(name, "max_replication_slots" | "max_wal_senders").then_some(MIN_SENDERS_AND_SLOTS)
}

/// What one of [`AT_LEAST_THE_PRIMARYS`] is in the end, set or not. PostgreSQL's own values are the same in
/// every major.
pub fn limit(name: &str, value: Option<&str>, version: Option<u16>) -> Option<f64> {
    let defaults = [100.0, 64.0, 0.0, 10.0, 8.0];
    let default =
        AT_LEAST_THE_PRIMARYS.iter().position(|ordered| *ordered == name).map(|index| defaults[index])?;
    let set = value.and_then(|value| number(name, value, version)).unwrap_or(default);
    Some(set.max(floor(name).unwrap_or(0) as f64))
}

/// When a changed value takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Context {
    /// By a reload, at once or in the next session.
    Reload,
    Restart,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Bool,
    Integer { unit: &'static str, least: f64, most: f64 },
    Real { unit: &'static str, least: f64, most: f64 },
    Enum(Vec<&'static str>),
    Text,
}

/// One row of the table: a setting in a range of majors.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    pub name: &'static str,
    pub versions: RangeInclusive<u16>,
    pub context: Context,
    pub kind: Kind,
}

/// Why a parameter is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParameterError {
    Unknown {
        name: String,
        meant: Option<&'static str>,
    },
    NotInVersion {
        name: &'static str,
        version: u16,
        versions: Vec<RangeInclusive<u16>>,
    },
    Managed {
        name: String,
        why: &'static str,
    },
    /// Settable, but not to this.
    Unsafe {
        name: &'static str,
        value: String,
        why: &'static str,
    },
    Value {
        name: &'static str,
        value: String,
        takes: String,
    },
    ControlCharacter {
        name: String,
    },
}

impl fmt::Display for ParameterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParameterError::Unknown { name, .. } => write!(f, "PostgreSQL has no parameter \"{name}\""),
            ParameterError::NotInVersion { name, version, .. } => {
                write!(f, "PostgreSQL {version} has no parameter \"{name}\"")
            }
            ParameterError::Managed { name, why } => write!(f, "\"{name}\" is not yours to set: {why}"),
            ParameterError::Unsafe { name, value, why } => write!(f, "{name} = {value} is refused: {why}"),
            ParameterError::Value { name, value, takes } => {
                write!(f, "{name} takes {takes}, not \"{value}\"")
            }
            ParameterError::ControlCharacter { name } => {
                write!(
                    f,
                    "the value of \"{name}\" holds a control character, which no line of postgresql.conf can"
                )
            }
        }
    }
}

impl std::error::Error for ParameterError {}

impl ParameterError {
    pub fn hint(&self) -> Option<String> {
        match self {
            ParameterError::Unknown { meant: Some(meant), .. } => Some(format!("did you mean \"{meant}\"?")),
            ParameterError::Unknown { meant: None, .. } => Some(
                "a parameter of an extension is written with its prefix: \"pg_stat_statements.max\""
                    .to_owned(),
            ),
            ParameterError::NotInVersion { versions, .. } => {
                let first = versions.first()?.start();
                let last = versions.last()?.end();
                let from = if last == VERSIONS.end() { "from" } else { "up to" };
                Some(format!("it exists {from} PostgreSQL {}", if from == "from" { first } else { last }))
            }
            ParameterError::Managed { .. } => Some("leave it out".to_owned()),
            _ => None,
        }
    }
}

/// Settings that have another owner than the herd file's `parameters`, with the reason; also those that are
/// always the same, since a value that changes nothing is worse than none. A name that ends with `*` stands for
/// all that begin so, [`OPEN`] apart.
const MANAGED: &[(&str, &str)] = &[
    ("archive_cleanup_command", "WAL is removed only when no node and no backup needs it"),
    ("archive_command", "archiving belongs to [backup]: the herd streams WAL into its repository"),
    ("archive_library", "archiving belongs to [backup]: the herd streams WAL into its repository"),
    ("archive_mode", "archiving belongs to [backup]: the herd streams WAL into its repository"),
    ("cluster_name", "it is the node's name"),
    ("config_file", "pgherd writes the configuration files and knows where"),
    ("data_directory", "it is data_dir in the host's agent.toml"),
    ("data_sync_retry", "after a failed fsync the data is gone from memory; the node must be barred instead"),
    ("external_pid_file", "a leftover file would name a process that is not this PostgreSQL"),
    ("fsync", "always on: a commit that is not on disk is not durable, whatever was acknowledged"),
    ("full_page_writes", "always on: a torn page after a crash could not be repaired"),
    ("hba_file", "pgherd writes pg_hba.conf; lines of yours go to \"hba\""),
    ("hot_standby", "always on: agents ask standbys for their position, and clients read from them"),
    ("ident_file", "pgherd writes it, for its own roles"),
    ("ignore_checksum_failure", "damage bars a node; a setting must not hide it"),
    ("ignore_invalid_pages", "damage bars a node; a setting must not hide it"),
    ("include*", "a second file would set what this one does not show"),
    ("lc_messages", "agents read PostgreSQL's messages"),
    ("listen_addresses", "it follows from the node's host"),
    ("log_destination", "pgherd logs and the agents read PostgreSQL's log where they expect it"),
    ("log_directory", "pgherd logs and the agents read PostgreSQL's log where they expect it"),
    ("log_file_mode", "a log can hold statements with secrets; only its owner reads it"),
    ("log_filename", "pgherd logs and the agents read PostgreSQL's log where they expect it"),
    ("log_truncate_on_rotation", "a log that is cut is missing after the incident"),
    ("logging_collector", "pgherd logs and the agents read PostgreSQL's log where they expect it"),
    (
        "max_slot_wal_keep_size",
        "a quarter of the WAL volume, so that the slot of a lost node cannot fill the disk",
    ),
    ("password_encryption", "always scram-sha-256: an md5 password can be used by whoever reads it"),
    ("port", "it is the node's port"),
    ("primary_conninfo", "whom a standby follows is decided by the herd; see the node's \"follow\""),
    ("primary_slot_name", "each node has a slot of its own on every node that may become primary"),
    ("promote_trigger_file", "only an election promotes"),
    ("recovery_end_command", "only an election promotes, and nothing may delay it"),
    ("recovery_min_apply_delay", "it is the node's \"delay\", which also keeps it from being promoted"),
    ("recovery_target*", "a standby follows to the end; a moment in the past is for restores"),
    ("restart_after_crash", "always off: PostgreSQL must not become primary again without a new term"),
    ("restore_command", "a sealed node must not receive WAL by another way; pgherd sets it where it is safe"),
    ("ssl", "always on, with certificates of the herd's own authority"),
    ("ssl_*", "certificates are of the herd's own authority"),
    ("synchronous_standby_names", "it is the durability rule; set \"durability\" and \"needed\""),
    ("unix_socket_directories", "agents find PostgreSQL by it, so they choose it"),
    ("update_process_title", "always on: a seal finds WAL receivers by their titles"),
    ("wal_log_hints", "on where data checksums are off, so that an old primary can be rewound"),
    (
        "wal_receiver_create_temp_slot",
        "each node has a slot of its own on every node that may become primary",
    ),
    ("zero_damaged_pages", "damage bars a node; a setting must not hide it"),
];

/// What an operator may choose about TLS.
const OPEN: &[&str] = &[
    "ssl_ciphers",
    "ssl_ecdh_curve",
    "ssl_groups",
    "ssl_min_protocol_version",
    "ssl_prefer_server_ciphers",
    "ssl_tls13_ciphers",
];

/// Values that a setting must not have, because a promise rests on it: what it may be, and why.
const LIMITED: &[(&str, Allowed, &str)] = &[
    (
        "allow_system_table_mods",
        Allowed::Only(&["off"]),
        "a changed catalogue is damage that nothing can repair",
    ),
    (
        "client_min_messages",
        Allowed::Except(&["error"]),
        "the warning that a commit was not replicated must reach the client",
    ),
    (
        "superuser_reserved_connections",
        Allowed::AtLeast(3.0),
        "without three reserved connections busy clients lock out the agent, which looks like a failure",
    ),
    (
        "synchronous_commit",
        Allowed::Only(&["on", "remote_apply"]),
        "a commit would be acknowledged before the voters have flushed it; sessions may lower it for themselves",
    ),
    ("wal_level", Allowed::Except(&["minimal"]), "a standby needs at least replica"),
    (
        "wal_receiver_status_interval",
        Allowed::AtLeast(1.0),
        "a standby that does not report its position counts for no commit",
    ),
];

enum Allowed {
    Only(&'static [&'static str]),
    Except(&'static [&'static str]),
    AtLeast(f64),
}

/// All rows, by name.
pub fn table() -> &'static BTreeMap<&'static str, Vec<Parameter>> {
    static TABLE: OnceLock<BTreeMap<&'static str, Vec<Parameter>>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table: BTreeMap<&'static str, Vec<Parameter>> = BTreeMap::new();
        for line in include_str!("parameters.tsv").lines().filter(|line| !line.starts_with('#')) {
            let row = row(line).expect("every row of parameters.tsv is read by a test");
            table.entry(row.name).or_default().push(row);
        }
        table
    })
}

fn row(line: &'static str) -> Option<Parameter> {
    let mut columns = line.split('\t');
    let name = columns.next()?;
    let (first, last) = columns.next()?.split_once('-')?;
    let context = match columns.next()? {
        "postmaster" => Context::Restart,
        "sighup" | "backend" | "superuser-backend" | "superuser" | "user" => Context::Reload,
        _ => return None,
    };
    let (kind, unit, values) = (columns.next()?, columns.next().unwrap_or(""), columns.next().unwrap_or(""));
    let range = || {
        let (least, most) = values.split_once("..")?;
        Some((least.parse().ok()?, most.parse().ok()?))
    };
    let kind = match kind {
        "bool" => Kind::Bool,
        "integer" => range().map(|(least, most)| Kind::Integer { unit, least, most })?,
        "real" => range().map(|(least, most)| Kind::Real { unit, least, most })?,
        "enum" => Kind::Enum(values.split(',').collect()),
        "string" => Kind::Text,
        _ => return None,
    };
    Some(Parameter { name, versions: first.parse().ok()?..=last.parse().ok()?, context, kind })
}

/// The row that holds for a major; without one (a directory of binaries was named) the newest.
pub fn find(name: &str, version: Option<u16>) -> Option<&'static Parameter> {
    let rows = table().get(name)?;
    match version {
        Some(version) => rows.iter().find(|row| row.versions.contains(&version)),
        None => rows.last(),
    }
}

/// When a change takes effect. What an extension defines is taken to need a restart: some do, and a restart
/// that was not needed costs less than a value that is believed to be in force.
pub fn context(name: &str, version: Option<u16>) -> Context {
    find(name, version).map_or(Context::Restart, |row| row.context)
}

/// Whether the operator may set this parameter to this value.
pub fn check(name: &str, value: &str, version: Option<u16>) -> Result<(), ParameterError> {
    if let Some(why) = managed(name) {
        return Err(ParameterError::Managed { name: name.to_owned(), why });
    }
    if value.chars().any(char::is_control) {
        return Err(ParameterError::ControlCharacter { name: name.to_owned() });
    }
    if is_extension_name(name) {
        return Ok(());
    }
    let Some(rows) = table().get_key_value(name) else {
        let settable = table().keys().copied().filter(|name| managed(name).is_none());
        return Err(ParameterError::Unknown { name: name.to_owned(), meant: nearest(name, settable) });
    };
    let (&name, rows) = rows;
    let Some(row) = find(name, version) else {
        let versions = rows.iter().map(|row| row.versions.clone()).collect();
        return Err(ParameterError::NotInVersion { name, version: version.unwrap_or_default(), versions });
    };
    let Some(meaning) = row.kind.read(value) else {
        return Err(ParameterError::Value { name, value: value.to_owned(), takes: row.kind.takes() });
    };
    let limit = LIMITED.iter().find(|(limited, _, _)| *limited == name);
    let Some((_, allowed, why)) = limit else { return Ok(()) };
    let holds = match (allowed, &meaning) {
        (Allowed::Only(words), Meaning::Word(word)) => words.contains(word),
        (Allowed::Except(words), Meaning::Word(word)) => !words.contains(word),
        (Allowed::AtLeast(least), Meaning::Number(number)) => number >= least,
        _ => false,
    };
    if holds { Ok(()) } else { Err(ParameterError::Unsafe { name, value: value.to_owned(), why }) }
}

/// The number that a value of an integer or real parameter stands for, in the parameter's unit.
pub fn number(name: &str, value: &str, version: Option<u16>) -> Option<f64> {
    match find(name, version)?.kind.read(value)? {
        Meaning::Number(number) => Some(number),
        Meaning::Word(_) => None,
    }
}

/// Why a setting is not the operator's, if it is not.
fn managed(name: &str) -> Option<&'static str> {
    let named = |pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix) && !OPEN.contains(&name),
        None => pattern == name,
    };
    MANAGED.iter().find(|(pattern, _)| named(pattern)).map(|(_, why)| *why)
}

/// `prefix.name`, each a word: PostgreSQL keeps such a setting for an extension that may come later.
fn is_extension_name(name: &str) -> bool {
    let word = |part: &str| {
        part.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$')
    };
    name.contains('.') && name.split('.').all(word)
}

/// What a value means to PostgreSQL.
enum Meaning {
    /// A boolean (`on`, `off`) or one of an enum's words; a text is the empty word.
    Word(&'static str),
    Number(f64),
}

impl Kind {
    fn read(&self, value: &str) -> Option<Meaning> {
        match self {
            Kind::Bool => read_bool(value).map(Meaning::Word),
            Kind::Integer { unit, least, most } => {
                // Halves go to the even neighbour, as in PostgreSQL: 0.5 is 0.
                let number = read_quantity(value, unit)?.round_ties_even();
                (*least <= number && number <= *most).then_some(Meaning::Number(number))
            }
            Kind::Real { unit, least, most } => {
                let number = read_quantity(value, unit)?;
                (*least <= number && number <= *most).then_some(Meaning::Number(number))
            }
            Kind::Enum(words) => {
                let exact = words.iter().find(|word| word.eq_ignore_ascii_case(value)).copied();
                // Enums that have `on` and `off` among their words take the others' full spellings.
                let spelled = || match value.to_ascii_lowercase().as_str() {
                    "true" | "yes" | "1" if words.contains(&"on") => Some("on"),
                    "false" | "no" | "0" if words.contains(&"off") => Some("off"),
                    _ => None,
                };
                exact.or_else(spelled).map(Meaning::Word)
            }
            Kind::Text => Some(Meaning::Word("")),
        }
    }

    fn takes(&self) -> String {
        let number = |what: &str, unit: &str, least: f64, most: f64| {
            let units = match unit {
                "" => String::new(),
                "B" | "kB" | "8kB" | "MB" => format!(", in units of {unit} or with one of B, kB, MB, GB, TB"),
                _ => format!(", in units of {unit} or with one of us, ms, s, min, h, d"),
            };
            format!("{what} from {least} to {most}{units}")
        };
        match self {
            Kind::Bool => "on or off".to_owned(),
            Kind::Integer { unit, least, most } => number("a whole number", unit, *least, *most),
            Kind::Real { unit, least, most } => number("a number", unit, *least, *most),
            Kind::Enum(words) => format!("one of {}", words.join(", ")),
            Kind::Text => "a text".to_owned(),
        }
    }
}

/// PostgreSQL's spellings: `on` and `off` in full from two letters on, the others down to one.
fn read_bool(value: &str) -> Option<&'static str> {
    let value = value.to_ascii_lowercase();
    let begins = |word: &str, least: usize| value.len() >= least && word.starts_with(&value);
    if value == "1" || begins("on", 2) || begins("true", 1) || begins("yes", 1) {
        return Some("on");
    }
    (value == "0" || begins("off", 2) || begins("false", 1) || begins("no", 1)).then_some("off")
}

/// A number with an optional unit, in units of the parameter.
fn read_quantity(value: &str, unit: &str) -> Option<f64> {
    const MEMORY: &[(&str, f64)] = &[
        ("B", 1.0),
        ("kB", 1024.0),
        ("8kB", 8192.0),
        ("MB", 1_048_576.0),
        ("GB", 1_073_741_824.0),
        ("TB", 1_099_511_627_776.0),
    ];
    const TIME: &[(&str, f64)] =
        &[("us", 0.001), ("ms", 1.0), ("s", 1e3), ("min", 6e4), ("h", 3.6e6), ("d", 8.64e7)];
    let value = value.trim();
    let digits = if let Some(hex) = value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        return u32::from_str_radix(hex, 16).ok().map(f64::from);
    } else {
        let is_number = |(at, byte): (usize, u8)| {
            let exponent_sign = at > 0 && matches!(value.as_bytes()[at - 1], b'e' | b'E');
            let exponent = matches!(byte, b'e' | b'E')
                && value
                    .as_bytes()
                    .get(at + 1)
                    .is_some_and(|next| next.is_ascii_digit() || matches!(next, b'-' | b'+'));
            byte.is_ascii_digit()
                || byte == b'.'
                || exponent
                || (matches!(byte, b'-' | b'+') && (at == 0 || exponent_sign))
        };
        value.bytes().enumerate().take_while(|&it| is_number(it)).count()
    };
    let number: f64 = value[..digits].parse().ok()?;
    let suffix = value[digits..].trim();
    if suffix.is_empty() {
        return Some(number);
    }
    let units = if MEMORY.iter().any(|(name, _)| *name == unit) {
        MEMORY
    } else if TIME.iter().any(|(name, _)| *name == unit) {
        TIME
    } else {
        return None;
    };
    let factor = |wanted: &str| units.iter().find(|(name, _)| *name == wanted).map(|(_, factor)| *factor);
    let given = factor(suffix).filter(|_| suffix != "8kB")?;
    Some(number * given / factor(unit)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_read_and_every_rule_names_a_parameter() {
        assert_eq!(table().len(), 387);
        for rows in table().values() {
            for row in rows {
                assert!(
                    VERSIONS.contains(row.versions.start()) && VERSIONS.contains(row.versions.end()),
                    "{row:?}"
                );
            }
        }
        let named = MANAGED.iter().map(|(name, _)| *name).chain(LIMITED.iter().map(|(name, _, _)| *name));
        for name in named.chain(AT_LEAST_THE_PRIMARYS).filter(|name| *name != "include*") {
            let prefix = name.trim_end_matches('*');
            assert!(table().keys().any(|known| known.starts_with(prefix)), "no major has {name}");
        }
    }

    #[test]
    fn what_postgresql_takes_is_taken() {
        for (name, value) in [
            ("shared_buffers", "256MB"),
            ("shared_buffers", "32768"),
            ("shared_buffers", "0.5 GB"),
            ("work_mem", "4MB"),
            ("max_connections", "0x64"),
            ("checkpoint_completion_target", "0.9"),
            ("seq_page_cost", "1e0"),
            ("autovacuum_vacuum_cost_delay", "2ms"),
            ("wal_level", "LOGICAL"),
            ("synchronous_commit", "yes"),
            ("huge_pages", "try"),
            ("log_connections", "t"),
            ("effective_io_concurrency", "200"),
            ("statement_timeout", "5min"),
            ("idle_in_transaction_session_timeout", "1h"),
            ("wal_keep_size", "2GB"),
            ("search_path", "\"$user\", public"),
            ("auto_explain.log_min_duration", "250ms"),
        ] {
            assert_eq!(check(name, value, Some(15)), Ok(()), "{name} = {value}");
        }
    }

    #[test]
    fn what_postgresql_would_refuse_is_refused_with_what_it_takes() {
        for (name, value, told) in [
            (
                "shared_buffers",
                "256 mb",
                "takes a whole number from 16 to 1073741823, in units of 8kB or with one of",
            ),
            ("shared_buffers", "1min", "takes a whole number"),
            ("max_connections", "0", "takes a whole number from 1 to 262143, not \"0\""),
            ("max_connections", "many", "takes a whole number"),
            ("max_connections", "", "takes a whole number"),
            ("max_connections", "NaN", "takes a whole number"),
            ("wal_level", "archival", "takes one of minimal, replica, logical"),
            ("log_connections", "o", "takes on or off"),
            ("huge_pages", "t", "takes one of off, on, try"),
            ("join_collapse_limit", ".5", "takes a whole number from 1"),
            ("work_mem", "4MB\nfsync = off", "control character"),
            ("max_conections", "1", "has no parameter"),
            ("a..b", "1", "has no parameter"),
            ("io_method", "worker", "PostgreSQL 15 has no parameter \"io_method\""),
        ] {
            let error = check(name, value, Some(15)).unwrap_err();
            assert!(error.to_string().contains(told), "{name} = {value}: {error}");
        }
        assert_eq!(check("io_method", "worker", Some(18)), Ok(()));
        assert_eq!(check("io_method", "worker", None), Ok(()));
        let hint = |name, version| check(name, "1", version).unwrap_err().hint().unwrap();
        assert_eq!(hint("max_conections", Some(15)), "did you mean \"max_connections\"?");
        assert_eq!(hint("io_method", Some(15)), "it exists from PostgreSQL 18");
    }

    #[test]
    fn nobody_turns_off_what_a_promise_rests_on() {
        for (name, value) in [
            ("synchronous_commit", "local"),
            ("synchronous_commit", "false"),
            ("synchronous_commit", "remote_write"),
            ("wal_level", "minimal"),
            ("client_min_messages", "ERROR"),
            ("wal_receiver_status_interval", "0"),
            ("wal_receiver_status_interval", "0.4s"),
        ] {
            let refused = check(name, value, Some(16));
            assert!(matches!(refused, Err(ParameterError::Unsafe { .. })), "{name} = {value}: {refused:?}");
        }
        for name in [
            "synchronous_standby_names",
            "primary_conninfo",
            "recovery_target_lsn",
            "ssl",
            "ssl_ca_file",
            "include_dir",
            "fsync",
        ] {
            let refused = check(name, "", Some(16));
            assert!(matches!(refused, Err(ParameterError::Managed { .. })), "{name}: {refused:?}");
        }
        assert_eq!(check("ssl_min_protocol_version", "TLSv1.3", Some(16)), Ok(()));
    }

    #[test]
    fn contexts_follow_the_major() {
        assert_eq!(context("max_connections", Some(15)), Context::Restart);
        assert_eq!(context("work_mem", Some(15)), Context::Reload);
        assert_eq!(context("autovacuum_max_workers", Some(17)), Context::Restart);
        assert_eq!(context("autovacuum_max_workers", Some(18)), Context::Reload);
        assert_eq!(context("pg_stat_statements.max", Some(18)), Context::Restart);
    }
}
