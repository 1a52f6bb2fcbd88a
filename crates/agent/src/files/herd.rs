//! `herd.toml`: what the operator wants, from its text to a [`HerdSpec`] and back.
//!
//! First every key is read for itself, then `core::spec` judges the whole; both kinds of mistakes are told in
//! one list, each at its line. A rule that rests on a value which could not be read says nothing, because what
//! it would say is not true.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::PathBuf;

use pgherd_core::spec::backup::{Location, Throttle};
use pgherd_core::spec::check::Wrong;
use pgherd_core::spec::parameters::ParameterError;
use pgherd_core::spec::times::{Time, TimesError};
use pgherd_core::spec::vip::Prefixed;
use pgherd_core::spec::{
    BackupSpec, ClusterSpec, DatabaseSpec, Durability, Format, HerdSpec, NodeSpec, OptionValue, Place, Pool,
    PostgresSource, PostgresSpec, ProxyOption, ProxySpec, ProxyTls, RepositorySpec, SpecError, Step, Times,
    TlsMode, VipSpec, WitnessSpec,
};
use pgherd_core::types::NodeName;

use super::agent::Listen;
use super::finding::{Findings, Kind, Mistake};
use super::reader::{Read, Reader, Section, Table};
use super::repository;
use crate::backups::drill::Query;
use crate::schedule::Schedule;

mod keys;
mod write;

pub use write::write;

/// A herd file that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Herd {
    pub spec: HerdSpec,
    /// What is allowed and probably not meant.
    pub warnings: Findings,
}

/// What shows a client of this herd that whoever answers is a proxy of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Believed {
    /// A certificate of the herd's authority.
    ByHerd,
    /// It knows what proves the role's password, bound to whatever certificate it shows: the herd does not know who made that.
    ByPassword,
    /// Nothing: it takes no TLS.
    InClear,
}

impl Herd {
    /// For the proxies of this cluster.
    pub fn believed(&self, cluster: &str) -> Believed {
        let spec = self.spec.clusters.iter().find(|known| known.name.as_str() == cluster);
        match spec.and_then(|spec| spec.proxy.as_ref()).map(|proxy| &proxy.tls) {
            Some(tls) if tls.client_mode == TlsMode::Disable => Believed::InClear,
            Some(tls) if tls.client_cert_file.is_some() => Believed::ByPassword,
            _ => Believed::ByHerd,
        }
    }
}

/// The page of the reference that describes the file.
pub fn reference() -> String {
    keys::reference()
}

/// Reads a herd file; `file` is its name for messages.
pub fn read(file: &str, text: &str) -> Result<Herd, Findings> {
    let (mut reader, top) = Reader::parse(text);
    let top = reader.top(&top, &keys::TOP);
    let spec = read_herd(&mut reader, &top);
    for error in spec.check() {
        if rests_on_read_values(&error, &reader) {
            let mistake = rule_mistake(&error, &reader);
            reader.mistake(mistake);
        }
    }
    if !reader.has_errors() {
        for warning in spec.doubts() {
            let span = reader.span_of(&in_file(&warning.at, &reader));
            let mut mistake = Mistake::new(Kind::Doubt, span, warning.doubt.to_string());
            mistake.hint = warning.doubt.hint();
            reader.mistake(mistake);
        }
    }
    let failed = reader.has_errors();
    let findings = reader.finish(file);
    if failed { Err(findings) } else { Ok(Herd { spec, warnings: findings }) }
}

/// Stands for a name that could not be read: valid, and equal to no other.
fn placeholder(number: usize) -> NodeName {
    format!("unreadable_{number}").parse().expect("letters, an underscore and digits")
}

fn read_herd(reader: &mut Reader<'_>, top: &Table<'_>) -> HerdSpec {
    let name = reader.parsed(top, "name").or(placeholder(0));
    let times = read_times(reader, top);
    let postgres = read_postgres(reader, top);
    let proxy = read_proxy(reader, top, &keys::PROXY, None);
    let backup = read_backup(reader, top, &keys::BACKUP, None);
    let mut unreadable = 1;

    let mut witnesses = Vec::new();
    for table in reader.tables(top, "witness", &keys::WITNESS) {
        let Read::Is(table) = table else { continue };
        unreadable += 1;
        let name = reader.parsed(&table, "name").or(placeholder(unreadable));
        let host = reader.text(&table, "host").or("unreadable".to_owned());
        witnesses.push(WitnessSpec { name, host, api_port: read_port(reader, &table, "api_port", 8009) });
    }

    let mut clusters = Vec::new();
    for (index, table) in reader.tables(top, "cluster", &keys::CLUSTER).into_iter().enumerate() {
        let Read::Is(table) = table else { continue };
        if index > 0 {
            let mistake =
                Mistake::new(Kind::NotBuiltYet, table.span.clone(), Wrong::SeveralClusters.to_string());
            reader.mistake(mistake.hint("make a herd file of its own for it"));
            continue;
        }
        unreadable += 1;
        let name = reader.parsed(&table, "name").or(placeholder(unreadable));
        let durability = read_durability(reader, &table);
        let mut nodes = Vec::new();
        for node in reader.tables(&table, "node", &keys::NODE) {
            let Read::Is(node) = node else { continue };
            unreadable += 1;
            nodes.push(read_node(reader, &node, placeholder(unreadable)));
        }
        let mut databases = Vec::new();
        for (index, database) in reader.tables(&table, "database", &keys::DATABASE).into_iter().enumerate() {
            let Read::Is(database) = database else { continue };
            let unreadable =
                || format!("unreadable_{index}").parse().expect("letters, an underscore and digits");
            let name = reader.parsed(&database, "name").or(unreadable());
            let owner = reader.parsed(&database, "owner").or(unreadable());
            databases.push(DatabaseSpec { name, owner });
        }
        let proxy = read_proxy(reader, &table, &keys::CLUSTER_PROXY, proxy.clone());
        let backup = read_backup(reader, &table, &keys::CLUSTER_BACKUP, backup.clone());
        let vip = read_vip(reader, &table);
        let postgres = postgres.clone();
        clusters.push(ClusterSpec { name, durability, postgres, nodes, databases, proxy, vip, backup });
    }
    HerdSpec { format: Format, name, times, clusters, witnesses }
}

fn read_times(reader: &mut Reader<'_>, top: &Table<'_>) -> Times {
    let mut times = Times::default();
    let Read::Is(table) = reader.table(top, "times", &keys::TIMES) else { return times };
    for time in Time::ALL {
        if let Read::Is(Some(value)) = reader.time(&table, time.key(), None) {
            times.set(time, value);
        }
    }
    times
}

fn read_postgres(reader: &mut Reader<'_>, top: &Table<'_>) -> PostgresSpec {
    // Without a major nothing is judged by one.
    let unknown = PostgresSource::BinDir(PathBuf::from("/"));
    let Read::Is(table) = reader.table(top, "postgres", &keys::POSTGRES) else {
        return PostgresSpec {
            source: unknown,
            parameters: Default::default(),
            hba: Vec::new(),
            ident: Vec::new(),
        };
    };
    let version = reader.whole(&table, "version", 1, u64::from(u16::MAX));
    let bin_dir = reader.text(&table, "bin_dir");
    let source = match (version, bin_dir) {
        (Read::Is(_), Read::Is(_)) => {
            let at = table.at.key("bin_dir");
            let mistake =
                Mistake::new(Kind::BrokenRule, reader.key_span_of(&at), "version and bin_dir are both given");
            reader.mistake(mistake.hint("bin_dir names one PostgreSQL, so leave version out"));
            unknown
        }
        (Read::Is(version), _) => PostgresSource::Version(version as u16),
        (_, Read::Is(bin_dir)) => PostgresSource::BinDir(PathBuf::from(bin_dir)),
        (Read::Absent, Read::Absent) => {
            if !reader.is_broken(&table.at.key("version")) && !reader.is_broken(&table.at.key("bin_dir")) {
                let message = "neither version nor bin_dir says which PostgreSQL runs";
                let mistake = Mistake::new(Kind::MissingKey, table.span.clone(), message);
                reader.mistake(mistake.hint("version = 15, or bin_dir = \"/usr/lib/postgresql/15/bin\""));
            }
            unknown
        }
        _ => unknown,
    };
    let parameters = reader.settings(&table, "parameters");
    let (hba, ident) = (reader.texts(&table, "hba"), reader.texts(&table, "ident"));
    PostgresSpec { source, parameters, hba, ident }
}

/// More base backups than anybody keeps.
const MOST_KEPT: u64 = 10_000;
/// PostgreSQL itself does not know more of them: `MAX_BACKENDS` in `postmaster.h`.
const MOST_SERVERS: u32 = 0x3_ffff;

/// Over what holds for every cluster, if anything does.
fn read_proxy(
    reader: &mut Reader<'_>,
    outer: &Table<'_>,
    section: &'static Section,
    general: Option<ProxySpec>,
) -> Option<ProxySpec> {
    let Read::Is(table) = reader.table(outer, "proxy", section) else { return general };
    let general = general.unwrap_or_default();
    let port = read_port(reader, &table, "port", general.port);
    let read_port = read_port(reader, &table, "read_port", general.read_port);
    let pool = match reader.text(&table, "pool") {
        Read::Is(pool) => read_pool(reader, &table.at.key("pool"), "pool", &pool).unwrap_or(general.pool),
        Read::Absent | Read::Broken => general.pool,
    };
    let pool_size = match reader.whole(&table, "pool_size", 1, u64::from(MOST_SERVERS)) {
        Read::Is(size) => size as u32,
        Read::Absent | Read::Broken => general.pool_size,
    };
    let databases = read_pools(reader, &table, "databases", general.databases);
    let users = read_pools(reader, &table, "users", general.users);
    let mut options = general.options;
    for option in ProxyOption::ALL {
        if let Read::Is(value) = read_option(reader, &table, option) {
            options.insert(option, value);
        }
    }
    let console_admins = read_roles(reader, &table, "console_admins", general.console_admins);
    let console_readers = read_roles(reader, &table, "console_readers", general.console_readers);
    let metrics_listen: Read<Listen> = reader.parsed(&table, "metrics_listen");
    let metrics_listen = metrics_listen.some().map(|listen| listen.to_string()).or(general.metrics_listen);
    let tls = read_tls(reader, &table, general.tls);
    Some(ProxySpec {
        port,
        read_port,
        tls,
        pool,
        pool_size,
        databases,
        users,
        options,
        console_admins,
        console_readers,
        metrics_listen,
    })
}

fn read_tls(reader: &mut Reader<'_>, table: &Table<'_>, general: ProxyTls) -> ProxyTls {
    let mut mode = |key: &str, general| match reader.text(table, key) {
        Read::Is(text) => TlsMode::named(&text).unwrap_or_else(|| {
            let names: Vec<String> = TlsMode::ALL.iter().map(|mode| format!("\"{mode}\"")).collect();
            let hint = Some(format!("there are {}", names.join(", ")));
            reader.wrong_value(&table.at.key(key), format!("\"{text}\" is no mode of TLS"), hint);
            general
        }),
        Read::Absent | Read::Broken => general,
    };
    let server_mode = mode("server_tls_mode", general.server_mode);
    let client_mode = mode("client_tls_mode", general.client_mode);
    let mut file = |key: &str, general: Option<String>| reader.text(table, key).some().or(general);
    let client_cert_file = file("client_tls_cert_file", general.client_cert_file);
    let client_key_file = file("client_tls_key_file", general.client_key_file);
    let client_ca_file = file("client_tls_ca_file", general.client_ca_file);
    let certificate_users = read_roles(reader, table, "certificate_users", general.certificate_users);
    ProxyTls {
        server_mode,
        client_mode,
        client_cert_file,
        client_key_file,
        client_ca_file,
        certificate_users,
    }
}

fn read_option(reader: &mut Reader<'_>, table: &Table<'_>, option: ProxyOption) -> Read<OptionValue> {
    let name = option.name();
    match option.default() {
        OptionValue::Switch(_) => reader.switch(table, name).map(OptionValue::Switch),
        OptionValue::Whole(_) => {
            let (least, most) = option.bounds();
            reader.whole(table, name, least, most).map(OptionValue::Whole)
        }
        OptionValue::Time { .. } => {
            let never = option.can_be_never().then_some("never");
            reader.time(table, name, never).map(OptionValue::of_time)
        }
    }
}

/// Roles that come in through a proxy, in place of those that hold for every cluster.
fn read_roles(
    reader: &mut Reader<'_>,
    table: &Table<'_>,
    key: &str,
    general: BTreeSet<String>,
) -> BTreeSet<String> {
    let at = table.at.key(key);
    let names = reader.texts(table, key);
    if !reader.has(&at) {
        return general;
    }
    for (index, name) in names.iter().enumerate() {
        if name.is_empty() || name.starts_with("pgherd_") {
            let message = format!("\"{name}\" is no role that comes in through a proxy");
            let hint = Some(format!("{key} = [\"alice\"]: a role that can log in with a password"));
            reader.wrong_value(&at.index(index), message, hint);
        }
    }
    names.into_iter().collect()
}

/// A table of names, over what holds for every cluster.
fn read_pools(
    reader: &mut Reader<'_>,
    table: &Table<'_>,
    key: &str,
    general: BTreeMap<String, Pool>,
) -> BTreeMap<String, Pool> {
    let mut pools = general;
    for (name, pool) in reader.settings(table, key) {
        let at = table.at.key(key).key(&name);
        if let Some(pool) = read_pool(reader, &at, &name, &pool) {
            pools.insert(name, pool);
        }
    }
    pools
}

fn read_pool(reader: &mut Reader<'_>, at: &Place, key: &str, text: &str) -> Option<Pool> {
    let pool = Pool::named(text);
    if pool.is_none() {
        let message = format!("\"{text}\" is no way to pool");
        let hint = format!("{key} = \"transaction\", \"session\" or \"statement\"");
        reader.wrong_value(at, message, Some(hint));
    }
    pool
}

/// Over what holds for every cluster, if anything does; a repository is one thing, of which no part comes from elsewhere.
fn read_backup(
    reader: &mut Reader<'_>,
    outer: &Table<'_>,
    section: &'static Section,
    general: Option<BackupSpec>,
) -> Option<BackupSpec> {
    let Read::Is(table) = reader.table(outer, "backup", section) else { return general };
    let own = repository::says_where(reader, &table) || general.is_none();
    let named = repository::read_keys(reader, &table);
    let named = match (named, &general) {
        (Some(named), _) => Some(named),
        (None, Some(general)) if !own => Some(general.repository.clone()),
        (None, _) => {
            let at = table.at.key("repository");
            if !reader.has(&at) {
                let message = "nothing says where the repository is";
                let mistake = Mistake::new(Kind::MissingKey, table.span.clone(), message);
                reader.mistake(mistake.hint(repository::PLACES));
            }
            None
        }
    };
    // What cannot be read is told already, and so is what stands beside it.
    let nowhere = || RepositorySpec { location: Location::Directory("/".into()), secret: None };
    let mut backup = general.unwrap_or_else(|| BackupSpec::new(nowhere()));
    let is_known = named.is_some();
    backup.repository = named.unwrap_or_else(nowhere);
    match reader.text(&table, "schedule") {
        Read::Is(schedule) if schedule == "never" => backup.schedule = None,
        Read::Is(schedule) => match Schedule::parse(&schedule) {
            Ok(_) => backup.schedule = Some(schedule),
            Err(error) => {
                let hint = "\"0 2 * * *\" is two o'clock each night, in UTC; \"never\" takes none by itself";
                let message = format!("\"{schedule}\" is no schedule: {error}");
                reader.wrong_value(&table.at.key("schedule"), message, Some(hint.to_owned()));
            }
        },
        Read::Absent | Read::Broken => {}
    }
    match reader.text(&table, "drill") {
        Read::Is(schedule) if schedule == "never" => backup.drill = None,
        Read::Is(schedule) => match Schedule::parse(&schedule) {
            Ok(_) => backup.drill = Some(schedule),
            Err(error) => {
                let hint =
                    "\"0 4 * * 7\" is four o'clock each Sunday, in UTC; \"never\" makes none by itself";
                let message = format!("\"{schedule}\" is no schedule: {error}");
                reader.wrong_value(&table.at.key("drill"), message, Some(hint.to_owned()));
            }
        },
        Read::Absent | Read::Broken => {}
    }
    if let Read::Is(dir) = reader.text(&table, "drill_dir") {
        backup.drill_dir = Some(dir.into());
    }
    let queries = reader.texts(&table, "drill_queries");
    if reader.has(&table.at.key("drill_queries")) {
        for (index, query) in queries.iter().enumerate() {
            if let Err(why) = query.parse::<Query>() {
                let at = table.at.key("drill_queries").index(index);
                reader.wrong_value(&at, format!("\"{query}\" is no query of a drill"), Some(why));
            }
        }
        backup.drill_queries = queries;
    }
    if let Read::Is(policy) = reader.parsed(&table, "retention") {
        backup.retention.policy = Some(policy);
    }
    let mut count = |key: &str, to: &mut u32| {
        if let Read::Is(number) = reader.whole(&table, key, 0, MOST_KEPT) {
            *to = number as u32;
        }
    };
    count("minimum_redundancy", &mut backup.retention.minimum_redundancy);
    count("daily", &mut backup.retention.tiers.daily);
    count("weekly", &mut backup.retention.tiers.weekly);
    count("monthly", &mut backup.retention.tiers.monthly);
    if let Read::Is(age) = reader.time(&table, "maximum_age", Some("never")) {
        backup.maximum_age = age;
    }
    if let Read::Is(interval) = reader.time(&table, "archive_interval", Some("never")) {
        backup.archive_interval = interval;
    }
    read_throttle(reader, &table, &mut backup.throttle);
    if let Read::Is(voter) = reader.switch(&table, "voter") {
        backup.voter = voter;
    }
    is_known.then_some(backup)
}

fn read_throttle(reader: &mut Reader<'_>, table: &Table<'_>, throttle: &mut Throttle) {
    let (switch, least) =
        (reader.switch(table, "throttle"), reader.whole(table, "min_rate", 1, u64::from(u32::MAX)));
    match switch {
        Read::Is(false) if least != Read::Absent => {
            let span = reader.key_span_of(&table.at.key("min_rate"));
            let message = "\"min_rate\" has no meaning with throttle = false";
            reader.mistake(Mistake::new(Kind::BrokenRule, span, message).hint("leave it out"));
            return;
        }
        Read::Is(false) => *throttle = Throttle::Never,
        Read::Is(true) if *throttle == Throttle::Never => *throttle = Throttle::ByItself,
        _ => {}
    }
    if let Some(mib) = least.some().and_then(|mib| NonZeroU32::new(u32::try_from(mib).ok()?)) {
        *throttle = Throttle::DownToMib(mib);
    }
}

/// `None` also where a part of it could not be read.
fn read_vip(reader: &mut Reader<'_>, outer: &Table<'_>) -> Option<VipSpec> {
    let Read::Is(table) = reader.table(outer, "vip", &keys::VIP) else { return None };
    let (address, interface) = (reader.text(&table, "address"), reader.text(&table, "interface"));
    let address = match address {
        Read::Is(text) => match text.parse::<Prefixed>() {
            Ok(address) => Some(address),
            Err(error) => {
                let hint = "give it as \"192.168.122.10/24\"".to_owned();
                reader.wrong_value(&table.at.key("address"), error.to_string(), Some(hint));
                None
            }
        },
        Read::Absent | Read::Broken => None,
    };
    Some(VipSpec { address: address?, interface: interface.some()? })
}

fn read_durability(reader: &mut Reader<'_>, table: &Table<'_>) -> Durability {
    let mode = reader.text(table, "durability");
    let needed = reader.whole(table, "needed", 0, u64::from(u8::MAX));
    let degrade_after = reader.time(table, "degrade_after", Some("never"));
    match mode {
        Read::Is(mode) if mode == "async" => {
            for (key, given) in
                [("needed", needed != Read::Absent), ("degrade_after", degrade_after != Read::Absent)]
            {
                if given {
                    let span = reader.key_span_of(&table.at.key(key));
                    let message = format!("\"{key}\" has no meaning with durability = \"async\"");
                    reader.mistake(Mistake::new(Kind::BrokenRule, span, message).hint("leave it out"));
                }
            }
            return Durability::Async;
        }
        Read::Is(mode) if mode != "quorum" => {
            let message = format!("durability is \"quorum\" or \"async\", not \"{mode}\"");
            let hint =
                "quorum: each commit is flushed by standbys; async: a failover may lose the last commits";
            reader.wrong_value(&table.at.key("durability"), message, Some(hint.to_owned()));
        }
        _ => {}
    }
    Durability::Quorum { needed: needed.or(1) as usize, degrade_after: degrade_after.or(None) }
}

fn read_node(reader: &mut Reader<'_>, table: &Table<'_>, unreadable: NodeName) -> NodeSpec {
    let name = reader.parsed(table, "name").or(unreadable);
    let host = reader.text(table, "host").or("unreadable".to_owned());
    NodeSpec {
        port: read_port(reader, table, "port", pgherd_core::spec::DEFAULT_PORT),
        api_port: read_port(reader, table, "api_port", pgherd_core::spec::DEFAULT_API_PORT),
        priority: reader
            .whole(table, "priority", 0, u64::from(u16::MAX))
            .or(u64::from(pgherd_core::spec::DEFAULT_PRIORITY)) as u16,
        parameters: reader.settings(table, "parameters"),
        follow: reader.parsed(table, "follow").some(),
        delay: reader.time(table, "delay", None).or(None),
        read_weight: reader
            .whole(table, "read_weight", 0, u64::from(pgherd_core::spec::MAX_READ_WEIGHT))
            .or(u64::from(pgherd_core::spec::DEFAULT_READ_WEIGHT)) as u16,
        ..NodeSpec::new(name, host)
    }
}

fn read_port(reader: &mut Reader<'_>, table: &Table<'_>, key: &str, default: u16) -> u16 {
    reader.whole(table, key, 1, u64::from(u16::MAX)).or(u64::from(default)) as u16
}

/// A place of the specification in the words of the file, where `[postgres]` stands for every cluster, and
/// `[proxy]` for those that say nothing else.
fn in_file(at: &Place, reader: &Reader<'_>) -> Place {
    match at.0.as_slice() {
        [Step::Key(cluster), Step::Index(_), Step::Key(proxy), ..]
            if cluster == "cluster" && proxy == "proxy" && !reader.has(at) =>
        {
            let general = Place(at.0[2..].to_vec());
            if reader.has(&general) { general } else { at.clone() }
        }
        [Step::Key(cluster), Step::Index(_), Step::Key(postgres), ..]
            if cluster == "cluster" && postgres == "postgres" =>
        {
            Place(at.0[2..].to_vec())
        }
        _ => at.clone(),
    }
}

/// Whether everything that a rule looked at could be read.
fn rests_on_read_values(error: &SpecError, reader: &Reader<'_>) -> bool {
    let at = in_file(&error.at, reader);
    if reader.is_broken(&at) {
        return false;
    }
    let last_is = |place: &Place, keys: &[&str]| matches!(place.0.last(), Some(Step::Key(key)) if keys.contains(&key.as_str()));
    let any_broken = |keys: &[&str]| reader.broken_places().iter().any(|place| last_is(place, keys));
    match &error.wrong {
        Wrong::Times(TimesError::OutOfBounds { .. }) => true,
        Wrong::Times(_) => !Time::ALL.iter().any(|time| any_broken(&[time.key()])),
        Wrong::TooFewElectable { .. } | Wrong::NoneElectable => {
            !any_broken(&["node", "delay", "priority", "needed", "durability", "voter"])
        }
        Wrong::VoterOfNothing => !any_broken(&["durability"]),
        Wrong::VoterInDirectory { .. } => !any_broken(&["repository", "keeper", "node", "host"]),
        Wrong::FollowsUnknown { .. } | Wrong::FollowsInACircle { .. } => {
            !any_broken(&["node", "name", "follow"])
        }
        Wrong::PortTwice { .. } | Wrong::ProxyPortOfNode { .. } => {
            !any_broken(&["port", "read_port", "api_port", "host"])
        }
        Wrong::ProxyPortTwice { .. } => !any_broken(&["port", "read_port"]),
        Wrong::VipOfNode { .. } | Wrong::VipOnLoopback { .. } | Wrong::VipOnOneHost { .. } => {
            !any_broken(&["node", "host"])
        }
        Wrong::VipNeedsLease { .. } => !any_broken(&["lease", "renew"]),
        Wrong::Host { host } => host != "unreadable",
        Wrong::DegradeTooSoon { .. } => !any_broken(&["suspect"]),
        Wrong::Parameter(ParameterError::NotInVersion { .. }) => !any_broken(&["version", "bin_dir"]),
        _ => true,
    }
}

fn rule_mistake(error: &SpecError, reader: &Reader<'_>) -> Mistake {
    let at = in_file(&error.at, reader);
    let mut related: Option<(Range<usize>, &'static str)> = None;
    let span = match &error.wrong {
        Wrong::Parameter(ParameterError::Value { .. } | ParameterError::Unsafe { .. }) => reader.span_of(&at),
        Wrong::Parameter(_) | Wrong::ParameterOfOneNode { .. } => reader.key_span_of(&at),
        Wrong::Hba(hba) => reader.span_in_text(&at, hba.at.clone()),
        Wrong::NameTwice { first, .. } | Wrong::DatabaseTwice { first, .. } => {
            related = Some((reader.span_of(first), "it is used here first"));
            reader.span_of(&at)
        }
        Wrong::PortTwice { first, .. } | Wrong::ProxyPortOfNode { first, .. } => {
            related = Some((reader.span_of(first), "it is taken by this node"));
            reader.span_of(&at)
        }
        Wrong::VipOfNode { first, .. } => {
            related = Some((reader.span_of(first), "it is this node's"));
            reader.span_of(&at)
        }
        Wrong::VipOnLoopback { .. } | Wrong::VipOnOneHost { .. } => reader.key_span_of(&at),
        Wrong::ProxyPortTwice { first, .. } => {
            related = Some((reader.span_of(&in_file(first, reader)), "it is used here first"));
            reader.span_of(&at)
        }
        _ => reader.span_of(&at),
    };
    let kind = match &error.wrong {
        Wrong::Parameter(_) | Wrong::Hba(_) | Wrong::Host { .. } | Wrong::Version { .. } => Kind::WrongValue,
        Wrong::NoCluster | Wrong::NoNode => Kind::MissingKey,
        _ => Kind::BrokenRule,
    };
    let mut mistake = Mistake::new(kind, span, error.wrong.to_string());
    mistake.hint = error.wrong.hint();
    mistake.related = related;
    mistake
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key that the program knows and nobody reads would be taken and ignored.
    #[test]
    fn every_key_that_is_built_is_read() {
        let text = "[times]\n[postgres]\n[[witness]]\n[[cluster]]\n[[cluster.node]]\n[[cluster.database]]\n\
                    [cluster.proxy]\n[cluster.backup]\n[cluster.vip]\n[proxy]\n[backup]\n";
        let (mut reader, top) = Reader::parse(text);
        let top = reader.top(&top, &keys::TOP);
        read_herd(&mut reader, &top);
        for section in keys::ALL {
            for key in section.keys.iter().filter(|key| key.built) {
                let asked = reader.asked.contains(&(section.header, key.name));
                assert!(asked, "{} {} is read by nobody", section.header, key.name);
            }
        }
    }
}
