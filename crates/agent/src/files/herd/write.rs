//! A herd file from a specification: what `up` and `init` leave for the operator to change.
//!
//! What differs from the default is written, the rest stands as a comment beside it. Reading it back gives
//! the same specification.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use pgherd_core::retention::Tiers;
use pgherd_core::spec::backup::{DEFAULT_ARCHIVE_INTERVAL, Throttle};
use pgherd_core::spec::times::Time;
use pgherd_core::spec::{
    BackupSpec, DEFAULT_API_PORT, DEFAULT_PORT, DEFAULT_PRIORITY, DEFAULT_PROXY_PORT,
    DEFAULT_PROXY_READ_PORT, DEFAULT_READ_WEIGHT, Durability, HerdSpec, NodeSpec, OptionValue,
    PostgresSource, PostgresSpec, ProxySpec, ProxyTls, Span, Times,
};

use super::super::repository::{self, Value};

pub fn write(spec: &HerdSpec) -> String {
    let mut file = String::new();
    line(
        &mut file,
        format_args!("# A herd of PostgreSQL servers. After a change: pgherd plan, then pgherd apply."),
    );
    line(&mut file, format_args!("name = {}", quoted(spec.name.as_str())));
    write_times(&mut file, &spec.times);
    if let Some(cluster) = spec.clusters.first() {
        write_postgres(&mut file, &cluster.postgres);
        write_proxy(&mut file, cluster.proxy.as_ref());
        write_backup(&mut file, cluster.backup.as_ref());
    }
    for witness in &spec.witnesses {
        line(
            &mut file,
            format_args!("\n[[witness]]                     # votes in the store, holds no data"),
        );
        line(&mut file, format_args!("name = {}", quoted(witness.name.as_str())));
        line(&mut file, format_args!("host = {}", quoted(&witness.host)));
        if witness.api_port != DEFAULT_API_PORT {
            line(&mut file, format_args!("api_port = {}", witness.api_port));
        }
    }
    for cluster in &spec.clusters {
        line(&mut file, format_args!("\n[[cluster]]"));
        line(&mut file, format_args!("name = {}", quoted(cluster.name.as_str())));
        write_durability(&mut file, &cluster.durability);
        for node in &cluster.nodes {
            write_node(&mut file, node);
        }
        if let Some(vip) = &cluster.vip {
            line(&mut file, format_args!("\n  [cluster.vip]                 # is where clients are let in"));
            line(&mut file, format_args!("  address = {}", quoted(&vip.address.to_string())));
            line(&mut file, format_args!("  interface = {}", quoted(&vip.interface)));
        }
        for database in &cluster.databases {
            line(&mut file, format_args!("\n  [[cluster.database]]"));
            line(&mut file, format_args!("  name = {}", quoted(database.name.as_str())));
            line(&mut file, format_args!("  owner = {}", quoted(database.owner.as_str())));
        }
    }
    file
}

fn line(file: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(file, "{text}").expect("writing to a String cannot fail");
}

fn write_times(file: &mut String, times: &Times) {
    let defaults = Times::default();
    let changed: Vec<Time> =
        Time::ALL.into_iter().filter(|time| times.get(*time) != defaults.get(*time)).collect();
    if changed.is_empty() {
        let (lease, grace) = (Span(defaults.lease), Span(defaults.agent_grace));
        line(
            file,
            format_args!(
                "\n# [times]                       # lease = \"{lease}\", agent_grace = \"{grace}\", …"
            ),
        );
        return;
    }
    line(file, format_args!("\n[times]"));
    for time in changed {
        line(file, format_args!("{} = \"{}\"", time.key(), Span(times.get(time))));
    }
}

fn write_postgres(file: &mut String, postgres: &PostgresSpec) {
    line(file, format_args!("\n[postgres]"));
    match &postgres.source {
        PostgresSource::Version(version) => line(file, format_args!("version = {version}")),
        PostgresSource::BinDir(path) => {
            line(file, format_args!("bin_dir = {}", quoted(&path.display().to_string())));
        }
    }
    if postgres.parameters.is_empty() {
        line(file, format_args!("# parameters = {{ max_connections = 100, shared_buffers = \"256MB\" }}"));
    }
    if postgres.hba.is_empty() {
        line(file, format_args!("# hba = [\"host all all 192.0.2.0/24 scram-sha-256\"]"));
    } else {
        line(file, format_args!("hba = ["));
        for hba in &postgres.hba {
            line(file, format_args!("  {},", quoted(hba)));
        }
        line(file, format_args!("]"));
    }
    if !postgres.ident.is_empty() {
        line(file, format_args!("ident = ["));
        for ident in &postgres.ident {
            line(file, format_args!("  {},", quoted(ident)));
        }
        line(file, format_args!("]"));
    }
    if !postgres.parameters.is_empty() {
        line(file, format_args!("\n[postgres.parameters]"));
        for (name, value) in &postgres.parameters {
            line(file, format_args!("{} = {}", key(name), quoted(value)));
        }
    }
}

fn write_proxy(file: &mut String, proxy: Option<&ProxySpec>) {
    let Some(ProxySpec {
        port,
        read_port,
        pool,
        pool_size,
        databases,
        users,
        options,
        console_admins,
        console_readers,
        metrics_listen,
        tls,
    }) = proxy
    else {
        let (port, read_port) = (DEFAULT_PROXY_PORT, DEFAULT_PROXY_READ_PORT);
        let ports =
            format_args!("\n# [proxy]                       # port = {port}, read_port = {read_port}");
        return line(file, ports);
    };
    line(file, format_args!("\n[proxy]"));
    line(file, format_args!("port = {port}                     # leads to the primary"));
    line(file, format_args!("read_port = {read_port}                # leads to standbys"));
    line(file, format_args!("pool = {}", quoted(pool.as_str())));
    line(file, format_args!("pool_size = {pool_size}                 # servers of one database and user"));
    for (option, value) in options {
        match value {
            OptionValue::Time { .. } => {
                line(file, format_args!("{} = {}", option.name(), quoted(&value.to_string())));
            }
            _ => line(file, format_args!("{} = {value}", option.name())),
        }
    }
    for (key, roles) in [
        ("console_admins", console_admins),
        ("console_readers", console_readers),
        ("certificate_users", &tls.certificate_users),
    ] {
        if !roles.is_empty() {
            let roles: Vec<String> = roles.iter().map(|role| quoted(role)).collect();
            line(file, format_args!("{key} = [{}]", roles.join(", ")));
        }
    }
    for ((key, mode), (_, default)) in tls.modes().into_iter().zip(ProxyTls::default().modes()) {
        if mode != default {
            line(file, format_args!("{key} = {}", quoted(mode.as_str())));
        }
    }
    for (key, path) in tls.files() {
        if let Some(path) = path {
            line(file, format_args!("{key} = {}", quoted(path)));
        }
    }
    if let Some(listen) = metrics_listen {
        line(file, format_args!("metrics_listen = {}", quoted(listen)));
    }
    for (table, pools) in [("databases", databases), ("users", users)] {
        if !pools.is_empty() {
            line(file, format_args!("\n[proxy.{table}]"));
            for (name, pool) in pools {
                line(file, format_args!("{} = {}", key(name), quoted(pool.as_str())));
            }
        }
    }
}

fn write_backup(file: &mut String, backup: Option<&BackupSpec>) {
    let Some(backup) = backup else {
        let example = "repository = \"s3://bucket/shop\"";
        return line(file, format_args!("\n# [backup]                      # {example}"));
    };
    let BackupSpec { repository, schedule, retention, maximum_age, archive_interval, .. } = backup;
    line(file, format_args!("\n[backup]"));
    for (key, value) in repository::lines(repository) {
        match value {
            Value::Text(text) => line(file, format_args!("{key} = {}", quoted(&text))),
            Value::Switch(on) => line(file, format_args!("{key} = {on}")),
        }
    }
    let time =
        |time: &Option<Duration>| time.map_or_else(|| "never".to_owned(), |time| Span(time).to_string());
    let schedule = schedule.as_deref().unwrap_or("never");
    line(file, format_args!("schedule = {:<20} # when base backups are taken, in UTC", quoted(schedule)));
    match retention.policy {
        Some(policy) => line(file, format_args!("retention = {}", quoted(&policy.to_string()))),
        None => line(file, format_args!("# retention = \"RECOVERY WINDOW OF 7 DAYS\" # else nothing goes")),
    }
    line(file, format_args!("minimum_redundancy = {}", retention.minimum_redundancy));
    let Tiers { daily, weekly, monthly } = retention.tiers;
    for (key, count) in [("daily", daily), ("weekly", weekly), ("monthly", monthly)] {
        if count > 0 {
            line(file, format_args!("{key} = {count}"));
        }
    }
    if maximum_age.is_some() {
        line(file, format_args!("maximum_age = {}", quoted(&time(maximum_age))));
    }
    if *archive_interval != Some(DEFAULT_ARCHIVE_INTERVAL) {
        line(file, format_args!("archive_interval = {}", quoted(&time(archive_interval))));
    }
    match backup.throttle {
        Throttle::ByItself => {}
        Throttle::Never => line(file, format_args!("throttle = false")),
        Throttle::DownToMib(mib) => line(file, format_args!("min_rate = {mib}")),
    }
    let BackupSpec { voter, drill, drill_dir, drill_queries, .. } = backup;
    if *voter {
        line(file, format_args!("voter = true"));
    }
    if let Some(schedule) = drill {
        line(file, format_args!("drill = {}", quoted(schedule)));
    }
    if let Some(dir) = drill_dir {
        line(file, format_args!("drill_dir = {}", quoted(&dir.display().to_string())));
    }
    if !drill_queries.is_empty() {
        let queries: Vec<String> = drill_queries.iter().map(|query| quoted(query)).collect();
        line(file, format_args!("drill_queries = [{}]", queries.join(", ")));
    }
}

fn write_durability(file: &mut String, durability: &Durability) {
    let Durability::Quorum { needed, degrade_after } = durability else {
        line(file, format_args!("durability = \"async\"            # a failover may lose the last commits"));
        return;
    };
    line(
        file,
        format_args!("durability = \"quorum\"           # \"async\": a failover may lose the last commits"),
    );
    line(file, format_args!("needed = {needed}                      # standbys that must flush each commit"));
    match degrade_after {
        Some(after) => line(file, format_args!("degrade_after = \"{}\"", Span(*after))),
        None => line(
            file,
            format_args!(
                "degrade_after = \"never\"         # or a time, after which commits go on with fewer"
            ),
        ),
    }
}

fn write_node(file: &mut String, node: &NodeSpec) {
    line(file, format_args!("\n  [[cluster.node]]"));
    line(file, format_args!("  name = {}", quoted(node.name.as_str())));
    line(file, format_args!("  host = {}", quoted(&node.host)));
    for (name, value, default) in [
        ("port", node.port, DEFAULT_PORT),
        ("api_port", node.api_port, DEFAULT_API_PORT),
        ("priority", node.priority, DEFAULT_PRIORITY),
        ("read_weight", node.read_weight, DEFAULT_READ_WEIGHT),
    ] {
        if value != default {
            line(file, format_args!("  {name} = {value}"));
        }
    }
    if let Some(follow) = &node.follow {
        line(file, format_args!("  follow = {}", quoted(follow.as_str())));
    }
    if let Some(delay) = node.delay {
        line(file, format_args!("  delay = \"{}\"", Span(delay)));
    }
    if !node.parameters.is_empty() {
        line(file, format_args!("  parameters = {{ {} }}", inline(&node.parameters)));
    }
}

fn inline(parameters: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> =
        parameters.iter().map(|(name, value)| format!("{} = {}", key(name), quoted(value))).collect();
    pairs.join(", ")
}

fn quoted(text: &str) -> String {
    toml_edit::Value::from(text).to_string()
}

/// The name of an extension's parameter has a dot, which means a table unless it is quoted.
fn key(name: &str) -> String {
    toml_edit::Key::new(name).to_string()
}
