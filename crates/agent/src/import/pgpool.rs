//! `pgpool.conf`, as of Pgpool-II 4.7, and the `pool_hba.conf` beside it.
//!
//! Most of its settings are about finding out who the primary is, and about replacing it, which the herd does. They are known
//! by what they begin with, since nodes have numbers.

use std::path::Path;

use super::{At, Fate, ImportError, Imported, Outcome, quoted};

const HERD: &str = "the herd finds out by itself who the primary is, and replaces it";
const NODES: &str = "a proxy goes where the herd's routing table says; nodes stand in the herd file";
const SERVICE: &str = "the service manager has it: a proxy runs in the foreground and logs to stderr";
const LOGS: &str = "the console and the metrics have what was logged, and PostgreSQL logs statements";
const SPLITTING: &str = "read_port leads to standbys; with pool = \"transaction\" see split_reads of [proxy]";
const WATCHDOG: &str =
    "proxies do not watch each other: each follows the agents, and clients may name several";
const PROCESSES: &str = "one process serves all clients";
const PASSWORDS: &str = "clients are checked against what PostgreSQL stores; a proxy has no passwords";
const PER_PROXY: &str = "it belongs to one proxy: pgherd proxy add --listen, or its proxy.toml";

/// By its whole name.
#[rustfmt::skip]
const FATES: &[(&str, Fate)] = &[
    ("allow_clear_text_frontend_auth", Fate::Not("clients prove themselves with scram-sha-256")),
    ("allow_multiple_failover_requests_from_node", Fate::Implied(HERD)),
    ("allow_sql_comments", Fate::Not(SPLITTING)),
    ("app_name_redirect_preference_list", Fate::Not(SPLITTING)),
    ("auto_failback", Fate::Implied("a standby that follows again is used again")),
    ("auto_failback_interval", Fate::Implied("a standby that follows again is used again")),
    ("backend_clustering_mode", Fate::Implied("a herd replicates by streaming")),
    ("cache_safe_memqcache_table_list", Fate::Not("results are not cached")),
    ("cache_unsafe_memqcache_table_list", Fate::Not("results are not cached")),
    ("check_temp_table", Fate::Not(SPLITTING)),
    ("check_unlogged_table", Fate::Not(SPLITTING)),
    ("child_life_time", Fate::Implied(PROCESSES)),
    ("child_max_connections", Fate::Implied(PROCESSES)),
    ("clear_memqcache_on_startup", Fate::Not("results are not cached")),
    ("client_idle_limit_in_recovery", Fate::Implied("a node joins while clients go on")),
    ("client_min_messages", Fate::Implied("a client's setting follows it")),
    ("connect_timeout", Fate::Implied("it is built in")),
    ("connection_cache", Fate::Implied("servers are pooled")),
    ("database_redirect_preference_list", Fate::Not(SPLITTING)),
    ("delay_threshold", Fate::Not("max_replay_lag of [proxy] is a time: 30s without it")),
    ("delay_threshold_by_time", Fate::Not("see max_replay_lag of [proxy]: 30s without it")),
    ("detach_false_primary", Fate::Implied(HERD)),
    ("disable_load_balance_on_write", Fate::Not(SPLITTING)),
    ("dml_adaptive_object_relationship_list", Fate::Not(SPLITTING)),
    ("enable_consensus_with_half_votes", Fate::Implied(HERD)),
    ("enable_pool_hba", Fate::Implied("lines of hba always count")),
    ("enable_shared_relcache", Fate::Implied("the proxy does not look at catalogs")),
    ("failback_command", Fate::Implied(HERD)),
    ("failover_command", Fate::Implied(HERD)),
    ("failover_on_backend_error", Fate::Implied(HERD)),
    ("failover_on_backend_shutdown", Fate::Implied(HERD)),
    ("failover_require_consensus", Fate::Implied(HERD)),
    ("failover_when_quorum_exists", Fate::Implied(HERD)),
    ("fail_over_on_backend_error", Fate::Implied(HERD)),
    ("follow_primary_command", Fate::Implied(HERD)),
    ("ignore_leading_white_space", Fate::Not(SPLITTING)),
    ("insert_lock", Fate::Implied("a herd replicates by streaming")),
    ("listen_addresses", Fate::Not(PER_PROXY)),
    ("listen_backlog_multiplier", Fate::Implied("it is built in")),
    ("load_balance_mode", Fate::Not(SPLITTING)),
    ("lobj_lock_table", Fate::Implied("a herd replicates by streaming")),
    ("log_error_verbosity", Fate::Implied(LOGS)),
    ("logdir", Fate::Implied(SERVICE)),
    ("max_pool", Fate::Not("pool_size is for one database and user, and shared by all clients")),
    ("max_spare_children", Fate::Implied(PROCESSES)),
    ("memory_cache_enabled", Fate::Not("results are not cached")),
    ("min_spare_children", Fate::Implied(PROCESSES)),
    ("pid_file_name", Fate::Implied(SERVICE)),
    ("pool_passwd", Fate::Implied(PASSWORDS)),
    ("prefer_lower_delay_standby", Fate::Not(SPLITTING)),
    ("primary_routing_query_pattern_list", Fate::Not(SPLITTING)),
    ("process_management_mode", Fate::Implied(PROCESSES)),
    ("process_management_strategy", Fate::Implied(PROCESSES)),
    ("read_only_function_list", Fate::Not(SPLITTING)),
    ("replicate_select", Fate::Implied("a herd replicates by streaming")),
    ("replication_stop_on_mismatch", Fate::Implied("a herd replicates by streaming")),
    ("reserved_connections", Fate::Implied("clients wait instead of being refused")),
    ("reset_query_list", Fate::Implied("a server is cleaned when something may have been left in it")),
    ("search_primary_node_timeout", Fate::Implied(HERD)),
    ("serialize_accept", Fate::Implied(PROCESSES)),
    ("socket_dir", Fate::Not("a proxy listens on TCP")),
    ("statement_level_load_balance", Fate::Not(SPLITTING)),
    ("trusted_server_command", Fate::Implied(HERD)),
    ("trusted_servers", Fate::Implied(HERD)),
    ("unix_socket_directories", Fate::Not("a proxy listens on TCP")),
    ("unix_socket_group", Fate::Not("a proxy listens on TCP")),
    ("unix_socket_permissions", Fate::Not("a proxy listens on TCP")),
    ("use_watchdog", Fate::Implied(WATCHDOG)),
    ("user_redirect_preference_list", Fate::Not(SPLITTING)),
    ("work_dir", Fate::Implied(SERVICE)),
    ("write_function_list", Fate::Not(SPLITTING)),
];

/// By what it begins with.
#[rustfmt::skip]
const BEGINNINGS: &[(&str, Fate)] = &[
    ("arping_", Fate::Implied("the agent tells neighbours where an address is by itself")),
    ("backend_weight", Fate::Not("see read_weight of each node")),
    ("backend_", Fate::Implied(NODES)),
    ("delegate_", Fate::Not("it goes into [cluster.vip], and follows the primary instead of a proxy")),
    ("health_check_", Fate::Implied(HERD)),
    ("heartbeat_", Fate::Implied(WATCHDOG)),
    ("hostname", Fate::Implied(WATCHDOG)),
    ("if_", Fate::Implied("the agent takes and leaves the address of [cluster.vip] by itself")),
    ("log_", Fate::Implied(LOGS)),
    ("logging_collector", Fate::Implied(SERVICE)),
    ("memqcache_", Fate::Not("results are not cached")),
    ("other_pgpool_", Fate::Implied(WATCHDOG)),
    ("other_wd_", Fate::Implied(WATCHDOG)),
    ("pcp_", Fate::Implied("the console has ATTACH, DETACH and PROMOTE for console_admins of [proxy]")),
    ("pgpool_port", Fate::Implied(WATCHDOG)),
    ("ping_path", Fate::Implied(WATCHDOG)),
    ("recovery_", Fate::Implied("a node joins with a token and copies itself")),
    ("relcache_", Fate::Implied("the proxy does not look at catalogs")),
    ("sr_check_", Fate::Implied("agents know how far their standbys are")),
    ("ssl", Fate::Not("certificates of your own go into client_tls_cert_file, client_tls_key_file and client_tls_ca_file; without them the herd's are used")),
    ("syslog_", Fate::Implied(SERVICE)),
    ("wd_", Fate::Implied(WATCHDOG)),
];

pub(super) fn import(imported: &mut Imported, path: &Path, text: &str) -> Result<(), ImportError> {
    let file = path.display().to_string();
    for (number, line) in (1..).zip(text.lines()) {
        let at = At { file: &file, line: number };
        let wrong = |what| ImportError::Line { file: file.clone(), line: number, what };
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(|| wrong("it is no setting"))?;
        let key = key.trim().to_ascii_lowercase();
        let value = value_of(value.trim()).ok_or_else(|| wrong("a quote does not end"))?;
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(wrong("it is no setting"));
        }
        setting(imported, &at, &key, &value);
    }
    if !imported.proxy.contains_key("pool") {
        let value =
            super::Value { value: quoted("session"), from: format!("{file}: Pgpool-II knows no other way") };
        imported.proxy.insert("pool", value);
    }
    let hba = path.with_file_name("pool_hba.conf");
    if hba.exists() {
        imported.hba(&hba)?;
    }
    Ok(())
}

/// Without its quotes, and without a remark behind it.
fn value_of(text: &str) -> Option<String> {
    match text.strip_prefix('\'') {
        Some(inner) => inner.split_once('\'').map(|(value, _)| value.to_owned()),
        None => Some(text.split('#').next().unwrap_or_default().trim().to_owned()),
    }
}

fn setting(imported: &mut Imported, at: &At<'_>, key: &str, value: &str) {
    if key == "port" {
        return imported.take_number(at, key, value, "port", 1, u64::from(u16::MAX));
    }
    match key {
        "num_init_children" => return imported.take_number(at, key, value, "max_clients", 1, 1_000_000),
        "authentication_timeout" => return imported.take_seconds(at, key, value, "login_timeout", None),
        "connection_life_time" => return imported.take_seconds(at, key, value, "server_lifetime", None),
        "client_idle_limit" => {
            return imported.take_seconds(at, key, value, "client_idle_timeout", Some("never"));
        }
        _ => {}
    }
    let whole = FATES.iter().find(|(known, _)| *known == key);
    match whole.or_else(|| BEGINNINGS.iter().find(|(begin, _)| key.starts_with(begin))) {
        Some((_, fate)) => imported.fate(at, key, *fate),
        None => imported.note(at, key, Outcome::Unknown, "Pgpool-II has no such setting"),
    }
}
