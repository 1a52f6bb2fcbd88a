//! `pgbouncer.ini`, as of PgBouncer 1.25: sections, `%include`, connection strings.

use std::path::{Path, PathBuf};

use pgherd_core::spec::TlsMode;

use super::{At, Fate, ImportError, Imported, Outcome, Value, quoted};

/// Where a line of a file belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Section {
    None,
    Pgbouncer,
    Databases,
    Users,
    Peers,
    Other(String),
}

const NODES: &str = "a proxy goes where the herd's routing table says";
const VERIFIERS: &str = "clients are checked against what PostgreSQL stores; a proxy has no passwords";
const BUILT_IN: &str = "it is built in";
const NOT_A_KEY: &str = "the herd file has no key for it";
const FOR_ALL: &str = "in [proxy] it is for all";
const PER_PROXY: &str = "it belongs to one proxy: pgherd proxy add --listen, or its proxy.toml";
const SERVICE: &str = "the service manager has it: a proxy runs in the foreground and logs to stderr";
const CERTIFICATES: &str = "the herd's own authority makes and renews the certificates, on both sides";
const KERNEL: &str = "connections have no delay; the kernel has the rest";
const KEEPALIVES: &str =
    "a side that is silent for 30 s is asked whether it is there, and given up half a minute later";

/// They have the same names in the herd file.
const FILES: [&str; 3] = ["client_tls_ca_file", "client_tls_cert_file", "client_tls_key_file"];

const MOST_CLIENTS: u64 = 1_000_000;
/// What PgBouncer means by a timeout of 0.
const NEVER: Option<&str> = Some("never");

/// Every other setting of `[pgbouncer]`.
#[rustfmt::skip]
const FATES: &[(&str, Fate)] = &[
    ("application_name_add_host", Fate::Not("SHOW CLIENTS has the address")),
    ("auth_dbname", Fate::Implied(VERIFIERS)),
    ("auth_file", Fate::Implied(VERIFIERS)),
    ("auth_ldap_options", Fate::Not("clients prove themselves with scram-sha-256 only")),
    ("auth_query", Fate::Implied(VERIFIERS)),
    ("auth_user", Fate::Implied(VERIFIERS)),
    ("autodb_idle_timeout", Fate::Implied("a pool that nobody uses is forgotten")),
    ("cancel_wait_timeout", Fate::Implied(BUILT_IN)),
    ("client_tls13_ciphers", Fate::Implied("TLS 1.2 and 1.3 with the ciphers that are safe today")),
    ("client_tls_ciphers", Fate::Implied("TLS 1.2 and 1.3 with the ciphers that are safe today")),
    ("client_tls_dheparams", Fate::Implied("TLS 1.2 and 1.3 with the ciphers that are safe today")),
    ("client_tls_ecdhcurve", Fate::Implied("TLS 1.2 and 1.3 with the ciphers that are safe today")),
    ("client_tls_protocols", Fate::Implied("TLS 1.2 and 1.3 with the ciphers that are safe today")),
    ("conffile", Fate::Implied(SERVICE)),
    ("disable_pqexec", Fate::Not("queries of several statements are always allowed")),
    ("dns_max_ttl", Fate::Implied(NODES)),
    ("dns_nxdomain_ttl", Fate::Implied(NODES)),
    ("dns_zone_check_period", Fate::Implied(NODES)),
    ("ignore_startup_parameters", Fate::Implied("what a startup packet sets follows its client")),
    ("job_name", Fate::Implied(SERVICE)),
    ("listen_addr", Fate::Not(PER_PROXY)),
    ("listen_backlog", Fate::Implied(BUILT_IN)),
    ("log_connections", Fate::Not("SHOW CLIENTS and the metrics have them")),
    ("log_disconnections", Fate::Not("SHOW CLIENTS and the metrics have them")),
    ("log_pooler_errors", Fate::Implied("the metrics count them by reason")),
    ("log_stats", Fate::Implied("SHOW STATS and the metrics have them")),
    ("logfile", Fate::Implied(SERVICE)),
    ("login_notify_message", Fate::Not(NOT_A_KEY)),
    ("max_db_connections", Fate::Not("pool_size is for one database and user; ALTER DATABASE … CONNECTION LIMIT holds for all")),
    ("max_packet_size", Fate::Implied("messages are passed on in pieces, however long")),
    ("max_prepared_statements", Fate::Implied("prepared statements follow their client; a server keeps 200")),
    ("max_user_connections", Fate::Not("pool_size is for one database and user; ALTER ROLE … CONNECTION LIMIT holds for all")),
    ("min_pool_size", Fate::Not("servers are opened when clients need them")),
    ("peer_id", Fate::Implied("a cancel reaches the proxy that has its client")),
    ("pidfile", Fate::Implied(SERVICE)),
    ("pkt_buf", Fate::Implied("an idle client has no buffer")),
    ("pool_idle_timeout", Fate::Implied("a pool that nobody uses is forgotten")),
    ("query_wait_notify", Fate::Not(NOT_A_KEY)),
    ("reserve_pool_size", Fate::Not("pool_size is all there is: the oldest client is served first")),
    ("reserve_pool_timeout", Fate::Not("pool_size is all there is: the oldest client is served first")),
    ("resolv_conf", Fate::Implied(NODES)),
    ("sbuf_loopcnt", Fate::Implied("workers take turns between their clients")),
    ("scram_iterations", Fate::Implied(VERIFIERS)),
    ("server_check_delay", Fate::Implied("a server that has closed is noticed before it is lent")),
    ("server_check_query", Fate::Implied("agents judge servers, and no query does")),
    ("server_connect_timeout", Fate::Implied(BUILT_IN)),
    ("server_fast_close", Fate::Not("a server is closed when its client gives it back")),
    ("server_login_retry", Fate::Implied("clients wait while nobody is let in, and it is tried again at once")),
    ("server_reset_query", Fate::Implied("a server is cleaned when something may have been left in it")),
    ("server_reset_query_always", Fate::Implied("a server is cleaned when something may have been left in it")),
    ("server_round_robin", Fate::Not("the server that was used last is used first, so that few stay warm")),
    ("server_tls13_ciphers", Fate::Implied(CERTIFICATES)),
    ("server_tls_ca_file", Fate::Implied(CERTIFICATES)),
    ("server_tls_cert_file", Fate::Implied(CERTIFICATES)),
    ("server_tls_ciphers", Fate::Implied(CERTIFICATES)),
    ("server_tls_key_file", Fate::Implied(CERTIFICATES)),
    ("server_tls_protocols", Fate::Implied(CERTIFICATES)),
    ("service_name", Fate::Implied(SERVICE)),
    ("so_reuseport", Fate::Implied("one process uses all cores")),
    ("stats_period", Fate::Implied(BUILT_IN)),
    ("suspend_timeout", Fate::Not("a proxy is replaced without suspending anybody: pgherd proxy --take-over")),
    ("syslog", Fate::Implied(SERVICE)),
    ("syslog_facility", Fate::Implied(SERVICE)),
    ("syslog_ident", Fate::Implied(SERVICE)),
    ("tcp_defer_accept", Fate::Implied(KERNEL)),
    ("tcp_keepalive", Fate::Implied(KEEPALIVES)),
    ("tcp_keepcnt", Fate::Implied(KEEPALIVES)),
    ("tcp_keepidle", Fate::Implied(KEEPALIVES)),
    ("tcp_keepintvl", Fate::Implied(KEEPALIVES)),
    ("tcp_socket_buffer", Fate::Implied(KERNEL)),
    ("tcp_user_timeout", Fate::Implied(KERNEL)),
    ("track_extra_parameters", Fate::Implied("every setting follows its client")),
    ("unix_socket_dir", Fate::Not("a proxy listens on TCP")),
    ("unix_socket_group", Fate::Not("a proxy listens on TCP")),
    ("unix_socket_mode", Fate::Not("a proxy listens on TCP")),
    ("user", Fate::Implied(SERVICE)),
    ("verbose", Fate::Implied("pgherd proxy -v")),
];

/// Words of a connection string, or of a user's settings; beside `pool_mode`.
#[rustfmt::skip]
const WORDS: &[(&str, Fate)] = &[
    ("application_name", Fate::Not("ALTER DATABASE … SET does so for all")),
    ("auth_dbname", Fate::Implied(VERIFIERS)),
    ("auth_query", Fate::Implied(VERIFIERS)),
    ("auth_user", Fate::Implied(VERIFIERS)),
    ("client_encoding", Fate::Not("ALTER DATABASE … SET does so for all")),
    ("client_idle_timeout", Fate::Not(FOR_ALL)),
    ("connect_query", Fate::Not("ALTER DATABASE … SET and ALTER ROLE … SET prepare a session")),
    ("datestyle", Fate::Not("ALTER DATABASE … SET does so for all")),
    ("host", Fate::Implied(NODES)),
    ("idle_transaction_timeout", Fate::Not(FOR_ALL)),
    ("load_balance_hosts", Fate::Implied(NODES)),
    ("max_db_client_connections", Fate::Not(FOR_ALL)),
    ("max_db_connections", Fate::Not("ALTER DATABASE … CONNECTION LIMIT holds for all")),
    ("max_user_client_connections", Fate::Not(FOR_ALL)),
    ("max_user_connections", Fate::Not("ALTER ROLE … CONNECTION LIMIT holds for all")),
    ("min_pool_size", Fate::Not("servers are opened when clients need them")),
    ("password", Fate::Not("a proxy has no passwords: clients come in as themselves")),
    ("pool_size", Fate::Not("pool_size is the same for every database and user")),
    ("port", Fate::Implied(NODES)),
    ("query_timeout", Fate::Not(FOR_ALL)),
    ("query_wait_timeout", Fate::Not(FOR_ALL)),
    ("reserve_pool", Fate::Not("pool_size is all there is")),
    ("reserve_pool_size", Fate::Not("pool_size is all there is")),
    ("server_lifetime", Fate::Implied("a server is replaced after an hour")),
    ("timezone", Fate::Not("ALTER DATABASE … SET does so for all")),
    ("transaction_timeout", Fate::Not(FOR_ALL)),
    ("user", Fate::Not("clients come in as themselves; give them a role in PostgreSQL")),
];

pub(super) fn import(imported: &mut Imported, path: &Path, text: &str) -> Result<(), ImportError> {
    let mut section = Section::None;
    let mut files = Named::default();
    read(imported, path, text, &mut section, &mut files)?;
    // A line of hba is worth something only with the map that it names.
    for path in files.ident {
        imported.ident(&path)?;
    }
    for path in files.hba {
        imported.hba(&path)?;
    }
    Ok(())
}

/// Files that the settings name.
#[derive(Default)]
struct Named {
    hba: Vec<PathBuf>,
    ident: Vec<PathBuf>,
}

fn read(
    imported: &mut Imported,
    path: &Path,
    text: &str,
    section: &mut Section,
    files: &mut Named,
) -> Result<(), ImportError> {
    let file = path.display().to_string();
    for (number, line) in (1..).zip(text.lines()) {
        let at = At { file: &file, line: number };
        let wrong = |what| ImportError::Line { file: file.clone(), line: number, what };
        let line = line.trim();
        if line.is_empty() || line.starts_with([';', '#']) {
            continue;
        }
        if let Some(included) = line.strip_prefix("%include") {
            let included = beside(path, included.trim());
            let text = imported.read(&included)?;
            read(imported, &included, &text, section, files)?;
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            *section = match name.strip_suffix(']').ok_or_else(|| wrong("a section does not end"))? {
                "pgbouncer" => Section::Pgbouncer,
                "databases" => Section::Databases,
                "users" => Section::Users,
                "peers" => Section::Peers,
                other => Section::Other(other.to_owned()),
            };
            continue;
        }
        let (key, value) =
            key_and_value(line).ok_or_else(|| wrong("it is neither a section nor a setting"))?;
        match section {
            Section::Pgbouncer => setting(imported, &at, &key, value, path, files),
            Section::Databases => named(imported, &at, &key, value, true).map_err(wrong)?,
            Section::Users => named(imported, &at, &key, value, false).map_err(wrong)?,
            Section::Peers => {
                imported.note(&at, &format!("[peers] {key}"), Outcome::Implied, "a proxy needs no peers");
            }
            Section::None => return Err(wrong("a setting before any section")),
            Section::Other(name) => {
                let key = format!("[{name}] {key}");
                imported.note(&at, &key, Outcome::Unknown, "PgBouncer has no such section");
            }
        }
    }
    Ok(())
}

/// A file that another one names: it may be anywhere, and most often lies beside it.
fn beside(path: &Path, name: &str) -> PathBuf {
    let name = Path::new(name.trim_matches(['\'', '"']));
    path.parent().map_or_else(|| name.to_owned(), |dir| dir.join(name))
}

/// A name may be in double quotes.
fn key_and_value(line: &str) -> Option<(String, &str)> {
    let (key, rest) = match line.strip_prefix('"') {
        Some(rest) => {
            let end = rest.find('"')?;
            (rest[..end].to_owned(), &rest[end + 1..])
        }
        None => {
            let end = line.find('=')?;
            (line[..end].trim().to_owned(), &line[end..])
        }
    };
    let value = rest.trim_start().strip_prefix('=')?;
    (!key.is_empty()).then(|| (key, value.trim()))
}

fn setting(imported: &mut Imported, at: &At<'_>, key: &str, value: &str, path: &Path, files: &mut Named) {
    match key {
        "listen_port" => imported.take_number(at, key, value, "port", 1, u64::from(u16::MAX)),
        "default_pool_size" => imported.take_number(at, key, value, "pool_size", 1, 0x3_ffff),
        "max_client_conn" => imported.take_number(at, key, value, "max_clients", 1, MOST_CLIENTS),
        "max_user_client_connections" => {
            imported.take_number(at, key, value, "max_user_clients", 0, MOST_CLIENTS);
        }
        "max_db_client_connections" => {
            imported.take_number(at, key, value, "max_database_clients", 0, MOST_CLIENTS);
        }
        "query_wait_timeout" => imported.take_seconds(at, key, value, "query_wait", None),
        "client_login_timeout" => imported.take_seconds(at, key, value, "login_timeout", None),
        "server_idle_timeout" => imported.take_seconds(at, key, value, "server_idle_timeout", None),
        "server_lifetime" => imported.take_seconds(at, key, value, "server_lifetime", None),
        "client_idle_timeout" => imported.take_seconds(at, key, value, "client_idle_timeout", NEVER),
        "query_timeout" => imported.take_seconds(at, key, value, "query_timeout", NEVER),
        "transaction_timeout" => imported.take_seconds(at, key, value, "transaction_timeout", NEVER),
        "idle_transaction_timeout" => {
            imported.take_seconds(at, key, value, "idle_transaction_timeout", NEVER);
        }
        "pool_mode" => match mode(value) {
            Some(mode) => imported.take(at, key, "pool", mode),
            None => imported.note(at, key, Outcome::Unknown, "it is no way to pool"),
        },
        "client_tls_sslmode" => client_mode(imported, at, key, value),
        "client_tls_ca_file" | "client_tls_cert_file" | "client_tls_key_file" => {
            let target = FILES.iter().find(|name| **name == key);
            match target.filter(|_| value.starts_with('/')) {
                Some(target) => imported.take(at, key, target, quoted(value)),
                None => imported.note(at, key, Outcome::NotTaken, "the path is not absolute"),
            }
        }
        // The herd's certificates are there anyhow, so that nobody has to ask for less.
        "server_tls_sslmode" => match TlsMode::named(value) {
            Some(TlsMode::VerifyFull) => imported.take(at, key, "server_tls_mode", quoted(value)),
            Some(_) => imported.note(
                at,
                key,
                Outcome::Implied,
                "servers are verified in full, by the herd's own certificates; server_tls_mode asks for less",
            ),
            None => imported.note(at, key, Outcome::Unknown, "it is no mode of TLS"),
        },
        "admin_users" => imported.take_roles(at, key, value, "console_admins"),
        "stats_users" => imported.take_roles(at, key, value, "console_readers"),
        "auth_hba_file" => {
            files.hba.push(beside(path, value));
            imported.note(at, key, Outcome::Taken, "its lines, as postgres.hba");
        }
        "auth_ident_file" => {
            files.ident.push(beside(path, value));
            imported.note(at, key, Outcome::Taken, "its lines, as postgres.ident");
        }
        "auth_type" => match value {
            "scram-sha-256" | "hba" => {
                imported.note(at, key, Outcome::Implied, "lines of hba say how clients prove themselves");
            }
            "md5" => {
                let why = "md5_passwords = true lets users in whose passwords are still stored so; others prove themselves with scram-sha-256";
                imported.note(at, key, Outcome::NotTaken, why);
            }
            "cert" => {
                let why = "it is a line of postgres.hba: hostssl all all all cert";
                imported.note(at, key, Outcome::NotTaken, why);
            }
            other => {
                let known = ["plain", "trust", "any", "pam", "ldap", "peer"].contains(&other);
                let outcome = if known { Outcome::NotTaken } else { Outcome::Unknown };
                imported.note(at, key, outcome, "clients prove themselves with scram-sha-256");
            }
        },
        _ => match FATES.iter().find(|(known, _)| *known == key) {
            Some((_, fate)) => imported.fate(at, key, *fate),
            None => imported.note(at, key, Outcome::Unknown, "PgBouncer has no such setting"),
        },
    }
}

/// PgBouncer's `verify-full` of clients asks for no more than its `verify-ca`.
fn client_mode(imported: &mut Imported, at: &At<'_>, key: &str, value: &str) {
    match TlsMode::named(value) {
        Some(TlsMode::VerifyFull) => {
            imported.take(at, key, "client_tls_mode", quoted(TlsMode::VerifyCa.as_str()));
            imported.note(
                at,
                key,
                Outcome::NotTaken,
                "PgBouncer does not compare names; client_tls_mode = \"verify-full\" does, with the user's",
            );
        }
        Some(mode) => imported.take(at, key, "client_tls_mode", quoted(mode.as_str())),
        None => imported.note(at, key, Outcome::Unknown, "it is no mode of TLS"),
    }
}

fn mode(text: &str) -> Option<String> {
    ["session", "transaction", "statement"].contains(&text).then(|| quoted(text))
}

/// A database with its connection string, or a user with its settings. Values are not told: one may be a password.
fn named(
    imported: &mut Imported,
    at: &At<'_>,
    name: &str,
    value: &str,
    is_database: bool,
) -> Result<(), &'static str> {
    let table = if is_database { "databases" } else { "users" };
    let words = words(value)?;
    let is_fallback = is_database && name == "*";
    if is_database {
        let why = if is_fallback {
            "every database of the herd is reached by its name"
        } else {
            "a database is reached by its name"
        };
        imported.note(at, &format!("[databases] {name}"), Outcome::Implied, why);
    }
    for (key, value) in words {
        let shown = format!("[{table}] {name}: {key}");
        match key.as_str() {
            "pool_mode" if is_fallback => {
                imported.note(at, &shown, Outcome::NotTaken, "pool of [proxy] is for all databases");
            }
            "pool_mode" => match mode(&value) {
                None => imported.note(at, &shown, Outcome::Unknown, "it is no way to pool"),
                Some(mode) => {
                    let values = if is_database { &mut imported.databases } else { &mut imported.users };
                    values.entry(name.to_owned()).or_insert(Value { value: mode, from: at.of("pool_mode") });
                    imported.note(at, &shown, Outcome::Taken, format!("proxy.{table}.{name}"));
                }
            },
            "dbname" if value == name => imported.note(at, &shown, Outcome::Implied, "it is the same"),
            "dbname" => {
                imported.note(at, &shown, Outcome::NotTaken, "a database has no other name in a proxy");
            }
            _ => match WORDS.iter().find(|(known, _)| *known == key) {
                Some((_, fate)) => imported.fate(at, &shown, *fate),
                None => imported.note(at, &shown, Outcome::Unknown, "PgBouncer has no such word"),
            },
        }
    }
    Ok(())
}

/// `key=value key='va''lue'`.
fn words(text: &str) -> Result<Vec<(String, String)>, &'static str> {
    let (mut words, mut rest) = (Vec::new(), text.trim());
    while !rest.is_empty() {
        let (key, behind) = rest.split_once('=').ok_or("a word of a connection string has no value")?;
        let behind = behind.trim_start();
        let (value, left) = match behind.strip_prefix('\'') {
            None => {
                let end = behind.find(char::is_whitespace).unwrap_or(behind.len());
                (behind[..end].to_owned(), &behind[end..])
            }
            Some(inner) => {
                let (mut value, mut letters) = (String::new(), inner.char_indices().peekable());
                let end = loop {
                    let (at, letter) = letters.next().ok_or("a quote does not end")?;
                    if letter != '\'' {
                        value.push(letter);
                    } else if letters.next_if(|(_, next)| *next == '\'').is_some() {
                        value.push('\'');
                    } else {
                        break at + 1;
                    }
                };
                (value, &inner[end..])
            }
        };
        words.push((key.trim().to_owned(), value));
        rest = left.trim_start();
    }
    Ok(words)
}
