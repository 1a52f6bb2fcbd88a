//! What a changed specification would do to a running herd: each change with its cost, or why it is refused.
//!
//! A pure comparison. It is shown before anything is done, and `apply` refuses what it refuses; carrying it
//! out is the business of the agents, who look at the specification as a whole and need no list of changes.
//!
//! Hazard: a cost that is told too low. Where a setting's effect is not known, the greater one is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::backup::Throttle;
use super::parameters::{self, AT_LEAST_THE_PRIMARYS, Context};
use super::times::{Span, Time};
use super::{BackupSpec, ClusterSpec, Durability, HerdSpec, NodeSpec, PostgresSource, ProxyOption, SqlName};
use crate::types::NodeName;

/// What an operator has to agree to, from nothing to data; in this order, so that the greatest of a plan is
/// the plan's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Impact {
    None,
    Reload,
    Restart,
    Switchover,
    Clone,
    /// Something is removed that cannot be had back.
    Destroy,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    pub changes: Vec<Change>,
    pub refusals: Vec<Refusal>,
    /// What has to be restarted afterwards, once for all changes of a cluster.
    pub restarts: Vec<Restart>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The place by names: `cluster.main.node.d`.
    pub path: String,
    pub from: Option<String>,
    pub to: Option<String>,
    pub effect: Effect,
}

/// What is done about a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Effect {
    /// Agents follow the specification from their next look at it.
    AtOnce,
    /// Raft's timers are set when an agent starts.
    WhenAgentsStart,
    /// Listeners are opened when a proxy starts.
    WhenProxiesStart,
    /// The primary has the address once its PostgreSQL listens on it. `restart`: those that listen on their node's own
    /// address alone.
    TakeVip {
        restart: Vec<NodeName>,
    },
    /// Connections to the one before end.
    MoveVip,
    DropVip,
    /// The owner of the archive begins there, with a base backup; what is at another place stays.
    ArchiveBegins,
    /// What is in the repository stays as it is.
    ArchiveEnds,
    /// Proxies ask for it every few seconds.
    Proxies,
    /// Proxies have it for clients that come in; the others stay as they are.
    NewClients,
    /// The durability rule changes, in joint steps.
    Rule,
    Reload {
        nodes: Vec<NodeName>,
    },
    PendingRestart {
        nodes: Vec<NodeName>,
    },
    Clone {
        node: NodeName,
    },
    /// A rule change takes it out of the voters; its process, its data and its membership in the store stay.
    Leave {
        node: NodeName,
    },
    Repoint {
        node: NodeName,
    },
    /// Not a voter while delayed: the rule changes before the delay begins, or after it has been caught up.
    Delay {
        node: NodeName,
    },
    JoinStore {
        witness: NodeName,
    },
    /// The file no longer asks for it; it stays.
    KeepDatabase {
        database: SqlName,
    },
}

impl Effect {
    pub fn impact(&self) -> Impact {
        match self {
            Effect::Reload { .. } | Effect::Repoint { .. } | Effect::Delay { .. } => Impact::Reload,
            Effect::PendingRestart { .. } => Impact::Restart,
            Effect::Clone { .. } => Impact::Clone,
            Effect::Leave { .. } => Impact::Destroy,
            // Sessions end, as after a restart.
            Effect::MoveVip | Effect::DropVip => Impact::Restart,
            Effect::TakeVip { restart } if !restart.is_empty() => Impact::Restart,
            Effect::TakeVip { .. }
            | Effect::AtOnce
            | Effect::WhenAgentsStart
            | Effect::WhenProxiesStart
            | Effect::Proxies
            | Effect::NewClients
            | Effect::ArchiveBegins
            | Effect::ArchiveEnds
            | Effect::Rule
            | Effect::JoinStore { .. }
            | Effect::KeepDatabase { .. } => Impact::None,
        }
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Effect::AtOnce => write!(f, "agents follow it at once"),
            Effect::WhenAgentsStart => write!(f, "each agent takes it at its next start"),
            Effect::WhenProxiesStart => write!(f, "each proxy takes it at its next start"),
            Effect::TakeVip { restart } => {
                write!(f, "agents need CAP_NET_ADMIN and CAP_NET_RAW; the primary takes the address")?;
                match restart.as_slice() {
                    [] => Ok(()),
                    nodes => {
                        write!(
                            f,
                            " once PostgreSQL listens on it, which {} will after a restart",
                            list(nodes)
                        )
                    }
                }
            }
            Effect::MoveVip => {
                write!(f, "the primary gives the one up and takes the other; connections to the one end")
            }
            Effect::DropVip => write!(f, "the primary gives the address up; connections to it end"),
            Effect::ArchiveBegins => {
                write!(f, "WAL goes there from now on, and a first base backup; what is elsewhere stays")
            }
            Effect::ArchiveEnds => {
                write!(
                    f,
                    "no WAL is archived from now on, and nothing later can be restored; what is there stays"
                )
            }
            Effect::Proxies => write!(f, "proxies follow it within seconds"),
            Effect::NewClients => write!(f, "holds for clients that connect from now on"),
            Effect::Rule => write!(f, "the durability rule changes, without a moment under neither"),
            Effect::Reload { nodes } => write!(f, "reload {}", list(nodes)),
            Effect::PendingRestart { nodes } => write!(f, "pending on {} until restarted", list(nodes)),
            Effect::Clone { node } => {
                write!(f, "{node} may join with a token; it is cloned, and then may count for commits")
            }
            Effect::Leave { node } => write!(
                f,
                "{node} counts for no commit any more; stop its agent by hand, and mind that it keeps its vote in \
                 the store"
            ),
            Effect::Repoint { node } => write!(f, "point {node} at its upstream"),
            Effect::Delay { node } => write!(f, "reload {node}; a delayed node counts for no commit"),
            Effect::JoinStore { witness } => write!(f, "{witness} may join with a token"),
            Effect::KeepDatabase { database } => {
                write!(f, "none: database {database} stays; DROP DATABASE removes it")
            }
        }
    }
}

/// One round of restarts of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Restart {
    pub cluster: NodeName,
    /// In this order. While nobody knows the primary, it is among them.
    pub standbys: Vec<NodeName>,
    /// If it is known and needs it.
    pub primary: Option<NodeName>,
    pub order: Order,
    /// Set on the standbys at least as great as on the primary: these gave the order.
    pub ordered_by: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Then a switchover, so that the old primary restarts as a standby.
    StandbysFirst,
    /// A standby with less than its primary does not start, so the primary must have less first.
    PrimaryFirst,
}

impl fmt::Display for Restart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let standbys = list(&self.standbys);
        match (&self.primary, self.order) {
            (None, _) => write!(f, "restart {standbys}"),
            (Some(primary), _) if standbys.is_empty() => write!(f, "restart {primary}"),
            (Some(primary), Order::StandbysFirst) => {
                write!(f, "restart {standbys}, then switch over from {primary} and restart it")
            }
            (Some(primary), Order::PrimaryFirst) => {
                let why = self.ordered_by.join(" and ");
                write!(f, "restart {primary} first and then {standbys}, because {why} went down")
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    pub path: String,
    pub from: Option<String>,
    pub to: Option<String>,
    pub why: Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Refused {
    HerdName,
    ClusterName,
    ClusterAdded,
    ClusterRemoved,
    Major,
    Address,
    PrimaryRemoved,
    /// Nobody could be asked who the primary is.
    PrimaryUnknown,
    PrimaryDelayed,
    PrimaryNeverPromoted,
    UpAndDown {
        raised: Vec<String>,
        lowered: Vec<String>,
    },
    WitnessRemoved,
    /// Databases of the file are created with their cluster.
    DatabaseAdded {
        database: SqlName,
        owner: SqlName,
    },
    Owner {
        database: SqlName,
        owner: SqlName,
    },
    /// Commits may have been acknowledged because they are there.
    RepositoryVotes,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::HerdName => write!(f, "the herd's name is in its certificates and cannot change"),
            Refused::ClusterName => {
                write!(f, "a cluster's name is in the store and in every client's settings")
            }
            Refused::ClusterAdded => write!(f, "a second cluster in one herd is not built yet"),
            Refused::ClusterRemoved => write!(f, "a cluster is not removed by a file"),
            Refused::Major => write!(f, "another major version of PostgreSQL needs pg_upgrade"),
            Refused::Address => write!(
                f,
                "a node keeps the address that it joined with: its certificate, the store and the other nodes name it"
            ),
            Refused::PrimaryRemoved => write!(f, "the node is the primary"),
            Refused::PrimaryUnknown => {
                write!(f, "who the primary is cannot be told now, and it may be this node")
            }
            Refused::PrimaryDelayed => write!(f, "the node is the primary, and a delayed node is none"),
            Refused::PrimaryNeverPromoted => {
                write!(f, "the node is the primary, and priority 0 forbids that")
            }
            Refused::UpAndDown { raised, lowered } => write!(
                f,
                "{} must be restarted standbys first, {} the primary first",
                raised.join(" and "),
                lowered.join(" and ")
            ),
            Refused::WitnessRemoved => write!(f, "taking a witness out of the store is not built yet"),
            Refused::DatabaseAdded { .. } => {
                write!(f, "databases of the file are created with their cluster, and that has been")
            }
            Refused::Owner { database, .. } => write!(f, "the owner of {database} is not changed by a file"),
            Refused::RepositoryVotes => {
                write!(f, "the repository votes, and what was acknowledged may be there alone")
            }
        }
    }
}

impl Refused {
    pub fn hint(&self) -> String {
        match self {
            Refused::HerdName | Refused::ClusterName => "put the old name back".to_owned(),
            Refused::ClusterAdded => "make a herd file of its own for it".to_owned(),
            Refused::ClusterRemoved => "stop it with pgherd down, on its hosts".to_owned(),
            Refused::Major => {
                "put the old version back; a herd of the other major can be filled by pg_dump".to_owned()
            }
            Refused::Address => "add it under another name and remove the old one".to_owned(),
            Refused::PrimaryRemoved | Refused::PrimaryDelayed | Refused::PrimaryNeverPromoted => {
                "pgherd switchover first".to_owned()
            }
            Refused::PrimaryUnknown => "pgherd status tells when the cluster has one".to_owned(),
            Refused::UpAndDown { .. } => "apply and restart one of the two first".to_owned(),
            Refused::WitnessRemoved => {
                "put it back; a witness that is off costs nothing but its vote".to_owned()
            }
            Refused::DatabaseAdded { database, owner } => format!(
                "leave it out of the file, and run CREATE DATABASE \"{database}\" OWNER \"{owner}\" on the primary"
            ),
            Refused::RepositoryVotes => {
                "apply voter = false first, and this when pgherd status does not name pgherd_repository among the voters any more".to_owned()
            }
            Refused::Owner { database, owner } => {
                format!("run ALTER DATABASE \"{database}\" OWNER TO \"{owner}\", then apply the file")
            }
        }
    }
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.refusals.is_empty()
    }

    pub fn impact(&self) -> Impact {
        self.changes.iter().map(|change| change.effect.impact()).max().unwrap_or(Impact::None)
    }
}

/// As `pgherd plan` prints it.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "nothing changes");
        }
        for Change { path, from, to, effect } in &self.changes {
            writeln!(f, "{}\n    {effect}", headline(path, from.as_deref(), to.as_deref()))?;
        }
        for restart in &self.restarts {
            writeln!(f, "to be restarted afterwards, in this order\n    {restart}")?;
        }
        for Refusal { path, from, to, why } in &self.refusals {
            let headline = headline(path, from.as_deref(), to.as_deref());
            writeln!(f, "refused: {headline}\n    {why}; {}", why.hint())?;
        }
        Ok(())
    }
}

fn headline(path: &str, from: Option<&str>, to: Option<&str>) -> String {
    match (from, to) {
        (None, None) => format!("~ {path}"),
        (None, Some(to)) => format!("+ {path} = {to}"),
        (Some(from), None) => format!("- {path} = {from}"),
        (Some(from), Some(to)) => format!("~ {path}: {from} -> {to}"),
    }
}

fn list(names: &[NodeName]) -> String {
    names.iter().map(NodeName::as_str).collect::<Vec<_>>().join(", ")
}

/// What replacing `old` by `new` would do, both valid. `primary_of` tells the primary of a cluster by its name.
pub fn plan(old: &HerdSpec, new: &HerdSpec, primary_of: impl Fn(&NodeName) -> Option<NodeName>) -> Plan {
    let mut plan = Plan::default();
    if old.name != new.name {
        plan.refuse("name", Some(&old.name), Some(&new.name), Refused::HerdName);
    }
    for time in Time::ALL {
        let raft = matches!(time, Time::RaftHeartbeat | Time::RaftElection);
        let effect = if raft { Effect::WhenAgentsStart } else { Effect::AtOnce };
        let (from, to) = (Span(old.times.get(time)), Span(new.times.get(time)));
        if from != to {
            plan.change(format!("times.{}", time.key()), Some(&from), Some(&to), effect);
        }
    }

    let (was, is) = (old.clusters.as_slice(), new.clusters.as_slice());
    if let ([was], [is]) = (was, is)
        && was.name != is.name
    {
        let path = format!("cluster.{}.name", was.name);
        plan.refuse(path, Some(&was.name), Some(&is.name), Refused::ClusterName);
        plan_cluster(&mut plan, was, is, primary_of(&was.name).as_ref());
    } else {
        for was in was {
            match new.cluster(&was.name) {
                Some(is) => plan_cluster(&mut plan, was, is, primary_of(&was.name).as_ref()),
                None => plan.refuse(
                    format!("cluster.{}", was.name),
                    Some(&was.name),
                    NONE,
                    Refused::ClusterRemoved,
                ),
            }
        }
        for is in is.iter().filter(|is| old.cluster(&is.name).is_none()) {
            plan.refuse(format!("cluster.{}", is.name), NONE, Some(&is.name), Refused::ClusterAdded);
        }
    }

    let witness = |spec: &HerdSpec, name| spec.witnesses.iter().find(|other| other.name == name).cloned();
    for was in &old.witnesses {
        let path = format!("witness.{}", was.name);
        let Some(is) = witness(new, was.name.clone()) else {
            plan.refuse(path, Some(&was.host), NONE, Refused::WitnessRemoved);
            continue;
        };
        let (from, to) = (address(&was.host, was.api_port), address(&is.host, is.api_port));
        if from != to {
            plan.refuse(path, Some(&from), Some(&to), Refused::Address);
        }
    }
    for is in new.witnesses.iter().filter(|is| witness(old, is.name.clone()).is_none()) {
        let effect = Effect::JoinStore { witness: is.name.clone() };
        plan.change(format!("witness.{}", is.name), NONE, Some(&is.host), effect);
    }
    plan
}

const NONE: Option<&String> = None;

impl Plan {
    fn change(
        &mut self,
        path: impl Into<String>,
        from: Option<&impl ToString>,
        to: Option<&impl ToString>,
        effect: Effect,
    ) {
        let (from, to) = (from.map(ToString::to_string), to.map(ToString::to_string));
        self.changes.push(Change { path: path.into(), from, to, effect });
    }

    fn refuse(
        &mut self,
        path: impl Into<String>,
        from: Option<&impl ToString>,
        to: Option<&impl ToString>,
        why: Refused,
    ) {
        let (from, to) = (from.map(ToString::to_string), to.map(ToString::to_string));
        self.refusals.push(Refusal { path: path.into(), from, to, why });
    }
}

fn plan_cluster(plan: &mut Plan, was: &ClusterSpec, is: &ClusterSpec, primary: Option<&NodeName>) {
    let root = format!("cluster.{}", was.name);
    if was.durability != is.durability {
        let (from, to) = (told(&was.durability), told(&is.durability));
        plan.change(format!("{root}.durability"), Some(&from), Some(&to), Effect::Rule);
    }
    plan_nodes(plan, &root, was, is, primary);
    plan_postgres(plan, &root, was, is, primary);

    let (from, to) = (was.proxy.clone().unwrap_or_default(), is.proxy.clone().unwrap_or_default());
    for (key, from, to) in [("port", from.port, to.port), ("read_port", from.read_port, to.read_port)] {
        if from != to {
            plan.change(format!("{root}.proxy.{key}"), Some(&from), Some(&to), Effect::WhenProxiesStart);
        }
    }
    let effect = Effect::NewClients;
    if from.pool != to.pool {
        plan.change(format!("{root}.proxy.pool"), Some(&from.pool), Some(&to.pool), effect.clone());
    }
    if from.pool_size != to.pool_size {
        let (from, to) = (from.pool_size, to.pool_size);
        plan.change(format!("{root}.proxy.pool_size"), Some(&from), Some(&to), Effect::Proxies);
    }
    for option in ProxyOption::ALL {
        let (path, from, to) =
            (format!("{root}.proxy.{}", option.name()), from.option(option), to.option(option));
        if from != to {
            plan.change(path, Some(&from), Some(&to), Effect::Proxies);
        }
    }
    let names = |names: &BTreeSet<String>| {
        let listed: Vec<&str> = names.iter().map(String::as_str).collect();
        (!listed.is_empty()).then(|| listed.join(", "))
    };
    for (key, from, to) in [
        ("console_admins", &from.console_admins, &to.console_admins),
        ("console_readers", &from.console_readers, &to.console_readers),
    ] {
        if from != to {
            let path = format!("{root}.proxy.{key}");
            plan.change(path, names(from).as_ref(), names(to).as_ref(), Effect::Proxies);
        }
    }
    for ((key, from), (_, to)) in from.tls.modes().into_iter().zip(to.tls.modes()) {
        if from != to {
            plan.change(format!("{root}.proxy.{key}"), Some(&from), Some(&to), Effect::Proxies);
        }
    }
    for ((key, from), (_, to)) in from.tls.files().into_iter().zip(to.tls.files()) {
        if from != to {
            plan.change(format!("{root}.proxy.{key}"), from, to, Effect::Proxies);
        }
    }
    if from.tls.certificate_users != to.tls.certificate_users {
        let path = format!("{root}.proxy.certificate_users");
        let nodes = is.nodes.iter().map(|node| node.name.clone()).collect();
        let (from, to) = (names(&from.tls.certificate_users), names(&to.tls.certificate_users));
        plan.change(path, from.as_ref(), to.as_ref(), Effect::Reload { nodes });
    }
    if from.metrics_listen != to.metrics_listen {
        let path = format!("{root}.proxy.metrics_listen");
        let (from, to) = (from.metrics_listen.as_ref(), to.metrics_listen.as_ref());
        plan.change(path, from, to, Effect::WhenProxiesStart);
    }
    for (key, from, to) in [("databases", &from.databases, &to.databases), ("users", &from.users, &to.users)]
    {
        let names: BTreeSet<&String> = from.keys().chain(to.keys()).collect();
        for name in names.into_iter().filter(|name| from.get(*name) != to.get(*name)) {
            let path = format!("{root}.proxy.{key}.{name}");
            plan.change(path, from.get(name), to.get(name), effect.clone());
        }
    }

    match (&was.vip, &is.vip) {
        (Some(from), Some(to)) => {
            let effect = Effect::MoveVip;
            if from.address != to.address {
                let path = format!("{root}.vip.address");
                plan.change(path, Some(&from.address), Some(&to.address), effect.clone());
            }
            if from.interface != to.interface {
                plan.change(
                    format!("{root}.vip.interface"),
                    Some(&from.interface),
                    Some(&to.interface),
                    effect,
                );
            }
        }
        (Some(from), None) => plan.change(format!("{root}.vip"), Some(from), NONE, Effect::DropVip),
        (None, Some(to)) => {
            let effect = Effect::TakeVip { restart: listening_narrowly(was, is) };
            plan.change(format!("{root}.vip"), NONE, Some(to), effect);
        }
        (None, None) => {}
    }

    plan_backup(plan, &root, was.backup.as_ref(), is.backup.as_ref());

    for database in &was.databases {
        let path = format!("{root}.database.{}", database.name);
        match is.databases.iter().find(|other| other.name == database.name) {
            None => {
                let effect = Effect::KeepDatabase { database: database.name.clone() };
                plan.change(path, Some(&database.owner), NONE, effect);
            }
            Some(other) if other.owner != database.owner => {
                let (database_name, owner) = (database.name.clone(), other.owner.clone());
                let why = Refused::Owner { database: database_name, owner };
                plan.refuse(format!("{path}.owner"), Some(&database.owner), Some(&other.owner), why);
            }
            Some(_) => {}
        }
    }
    for database in &is.databases {
        if !was.databases.iter().any(|other| other.name == database.name) {
            let why =
                Refused::DatabaseAdded { database: database.name.clone(), owner: database.owner.clone() };
            plan.refuse(format!("{root}.database.{}", database.name), NONE, Some(&database.owner), why);
        }
    }
}

fn plan_backup(plan: &mut Plan, root: &str, was: Option<&BackupSpec>, is: Option<&BackupSpec>) {
    let place = |spec: &BackupSpec| spec.repository.location.to_string();
    let (was, is) = match (was, is) {
        (None, None) => return,
        (Some(was), None) if was.voter => {
            let path = format!("{root}.backup");
            return plan.refuse(path, Some(&place(was)), NONE, Refused::RepositoryVotes);
        }
        (Some(was), None) => {
            return plan.change(format!("{root}.backup"), Some(&place(was)), NONE, Effect::ArchiveEnds);
        }
        (None, Some(is)) => {
            return plan.change(format!("{root}.backup"), NONE, Some(&place(is)), Effect::ArchiveBegins);
        }
        (Some(was), Some(is)) => (was, is),
    };
    let (from, to) = (place(was), place(is));
    if from != to && was.voter {
        let path = format!("{root}.backup.repository");
        plan.refuse(path, Some(&from), Some(&to), Refused::RepositoryVotes);
    } else if from != to {
        plan.change(format!("{root}.backup.repository"), Some(&from), Some(&to), Effect::ArchiveBegins);
    } else if was.repository != is.repository {
        // Names of files on each host, and how its store is spoken to.
        plan.change(
            format!("{root}.backup.repository"),
            Some(&"opened one way"),
            Some(&"another"),
            Effect::AtOnce,
        );
    }
    let never = || "never".to_owned();
    let time = |time: Option<Duration>| time.map_or_else(never, |time| Span(time).to_string());
    let schedule = |spec: &BackupSpec| spec.schedule.clone().unwrap_or_else(never);
    let drill = |spec: &BackupSpec| spec.drill.clone().unwrap_or_else(never);
    let drill_dir = |spec: &BackupSpec| {
        let dir = spec.drill_dir.as_ref().map(|dir| dir.display().to_string());
        dir.unwrap_or_else(|| "beside the agent's state".to_owned())
    };
    let drill_queries = |spec: &BackupSpec| match spec.drill_queries.as_slice() {
        [] => "none".to_owned(),
        queries => queries.join("; "),
    };
    let policy = |spec: &BackupSpec| {
        spec.retention.policy.map_or_else(|| "keep everything".to_owned(), |policy| policy.to_string())
    };
    let tiers = |spec: &BackupSpec| spec.retention.tiers;
    let throttle = |spec: &BackupSpec| (spec.throttle != Throttle::Never).to_string();
    let min_rate = |spec: &BackupSpec| match spec.throttle {
        Throttle::DownToMib(mib) => format!("{mib} MiB a second"),
        Throttle::ByItself | Throttle::Never => "by itself".to_owned(),
    };
    for (key, from, to) in [
        ("schedule", schedule(was), schedule(is)),
        ("retention", policy(was), policy(is)),
        (
            "minimum_redundancy",
            was.retention.minimum_redundancy.to_string(),
            is.retention.minimum_redundancy.to_string(),
        ),
        ("daily", tiers(was).daily.to_string(), tiers(is).daily.to_string()),
        ("weekly", tiers(was).weekly.to_string(), tiers(is).weekly.to_string()),
        ("monthly", tiers(was).monthly.to_string(), tiers(is).monthly.to_string()),
        ("maximum_age", time(was.maximum_age), time(is.maximum_age)),
        ("archive_interval", time(was.archive_interval), time(is.archive_interval)),
        ("throttle", throttle(was), throttle(is)),
        ("min_rate", min_rate(was), min_rate(is)),
        ("voter", was.voter.to_string(), is.voter.to_string()),
        ("drill", drill(was), drill(is)),
        ("drill_dir", drill_dir(was), drill_dir(is)),
        ("drill_queries", drill_queries(was), drill_queries(is)),
    ] {
        if from != to {
            plan.change(format!("{root}.backup.{key}"), Some(&from), Some(&to), Effect::AtOnce);
        }
    }
}

/// Nodes whose PostgreSQL has to be started anew to listen on an address that moves.
fn listening_narrowly(was: &ClusterSpec, is: &ClusterSpec) -> Vec<NodeName> {
    if was.vip.is_some() || is.vip.is_none() {
        return Vec::new();
    }
    let narrow = |node: &&NodeSpec| node.host.parse::<core::net::IpAddr>().is_ok();
    let stay = is.nodes.iter().filter(|node| was.node(&node.name).is_some());
    stay.filter(narrow).map(|node| node.name.clone()).collect()
}

fn plan_nodes(plan: &mut Plan, root: &str, was: &ClusterSpec, is: &ClusterSpec, primary: Option<&NodeName>) {
    for old in &was.nodes {
        let path = format!("{root}.node.{}", old.name);
        let leads = primary == Some(&old.name);
        let Some(new) = is.node(&old.name) else {
            let from = address(&old.host, old.port);
            match primary {
                Some(_) if leads => plan.refuse(path, Some(&from), NONE, Refused::PrimaryRemoved),
                Some(_) => plan.change(path, Some(&from), NONE, Effect::Leave { node: old.name.clone() }),
                None => plan.refuse(path, Some(&from), NONE, Refused::PrimaryUnknown),
            }
            continue;
        };
        let node = || new.name.clone();
        for (key, from, to) in [
            ("host", old.host.clone(), new.host.clone()),
            ("port", old.port.to_string(), new.port.to_string()),
            ("api_port", old.api_port.to_string(), new.api_port.to_string()),
        ] {
            if from != to {
                plan.refuse(format!("{path}.{key}"), Some(&from), Some(&to), Refused::Address);
            }
        }
        if old.priority != new.priority {
            let (path, from, to) = (format!("{path}.priority"), Some(&old.priority), Some(&new.priority));
            match primary {
                None if new.priority == 0 => plan.refuse(path, from, to, Refused::PrimaryUnknown),
                _ if leads && new.priority == 0 => plan.refuse(path, from, to, Refused::PrimaryNeverPromoted),
                _ => plan.change(path, from, to, Effect::AtOnce),
            }
        }
        if old.read_weight != new.read_weight {
            let (from, to) = (Some(&old.read_weight), Some(&new.read_weight));
            plan.change(format!("{path}.read_weight"), from, to, Effect::Proxies);
        }
        if old.follow != new.follow {
            let effect = Effect::Repoint { node: node() };
            plan.change(format!("{path}.follow"), old.follow.as_ref(), new.follow.as_ref(), effect);
        }
        if old.delay != new.delay {
            let (from, to) = (old.delay.map(Span), new.delay.map(Span));
            let (path, from, to) = (format!("{path}.delay"), from.as_ref(), to.as_ref());
            match primary {
                None if new.delay.is_some() => plan.refuse(path, from, to, Refused::PrimaryUnknown),
                _ if leads && new.delay.is_some() => plan.refuse(path, from, to, Refused::PrimaryDelayed),
                _ => plan.change(path, from, to, Effect::Delay { node: node() }),
            }
        }
    }
    for new in is.nodes.iter().filter(|new| was.node(&new.name).is_none()) {
        let path = format!("{root}.node.{}", new.name);
        plan.change(
            path,
            NONE,
            Some(&address(&new.host, new.port)),
            Effect::Clone { node: new.name.clone() },
        );
    }
}

fn plan_postgres(
    plan: &mut Plan,
    root: &str,
    was: &ClusterSpec,
    is: &ClusterSpec,
    primary: Option<&NodeName>,
) {
    let version = is.postgres.version();
    // Nodes that come or go start with the new settings, or do not care.
    let stay: Vec<(&NodeSpec, &NodeSpec)> =
        was.nodes.iter().filter_map(|old| Some((old, is.node(&old.name)?))).collect();
    let everyone: Vec<NodeName> = stay.iter().map(|(_, new)| new.name.clone()).collect();
    let mut restarted: BTreeSet<NodeName> = BTreeSet::new();

    if was.postgres.source != is.postgres.source {
        let path = format!("{root}.postgres");
        let (from, to) = (source(&was.postgres.source), source(&is.postgres.source));
        match (was.postgres.version(), version) {
            (Some(_), Some(_)) => plan.refuse(path, Some(&from), Some(&to), Refused::Major),
            _ => {
                let effect = Effect::PendingRestart { nodes: everyone.clone() };
                plan.change(path, Some(&from), Some(&to), effect);
                restarted.extend(everyone.iter().cloned());
            }
        }
    }
    for (key, was, is) in
        [("hba", &was.postgres.hba, &is.postgres.hba), ("ident", &was.postgres.ident, &is.postgres.ident)]
    {
        if was == is {
            continue;
        }
        let path = format!("{root}.postgres.{key}");
        for (lines, others, gone) in [(was, is, true), (is, was, false)] {
            for line in lines.iter().filter(|line| !others.contains(line)) {
                let (from, to) = if gone { (Some(line), None) } else { (None, Some(line)) };
                let effect = Effect::Reload { nodes: everyone.clone() };
                plan.change(path.clone(), from, to, effect);
            }
        }
        let same_lines = was.iter().collect::<BTreeSet<_>>() == is.iter().collect();
        if same_lines {
            // Only the order or the repetition differs, and the first line that fits wins.
            let effect = Effect::Reload { nodes: everyone.clone() };
            plan.change(path, NONE, NONE, effect);
        }
    }

    // Parameters, as each node has them in the end; a change that all of them see is told once.
    let mut by_change: BTreeMap<(String, Option<String>, Option<String>), Vec<NodeName>> = BTreeMap::new();
    for (old, new) in &stay {
        let (before, after) = (was.parameters(old), is.parameters(new));
        for name in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
            let (from, to) = (before.get(name).cloned(), after.get(name).cloned());
            if from != to {
                by_change.entry((name.clone(), from, to)).or_default().push(new.name.clone());
            }
        }
    }
    restarted.extend(listening_narrowly(was, is));
    let (mut raised, mut lowered) = (Vec::new(), Vec::new());
    for ((name, from, to), nodes) in by_change {
        let of_cluster = was.postgres.parameters.get(&name) != is.postgres.parameters.get(&name);
        let restarts = parameters::context(&name, version) == Context::Restart;
        if restarts {
            restarted.extend(nodes.iter().cloned());
        }
        if AT_LEAST_THE_PRIMARYS.contains(&name.as_str()) {
            let limit = |value: &Option<String>| parameters::limit(&name, value.as_deref(), version);
            if limit(&to) < limit(&from) {
                lowered.push(name.clone());
            } else if limit(&to) > limit(&from) {
                raised.push(name.clone());
            }
        }
        let effect =
            |nodes| if restarts { Effect::PendingRestart { nodes } } else { Effect::Reload { nodes } };
        if of_cluster {
            let path = format!("{root}.postgres.parameters.{name}");
            plan.change(path, from.as_ref(), to.as_ref(), effect(nodes));
        } else {
            for node in nodes {
                let path = format!("{root}.node.{node}.parameters.{name}");
                plan.change(path, from.as_ref(), to.as_ref(), effect(vec![node]));
            }
        }
    }
    if !raised.is_empty() && !lowered.is_empty() {
        let why = Refused::UpAndDown { raised: raised.clone(), lowered: lowered.clone() };
        plan.refuse(format!("{root}.postgres.parameters"), NONE, NONE, why);
    }
    if restarted.is_empty() {
        return;
    }
    let order = if lowered.is_empty() { Order::StandbysFirst } else { Order::PrimaryFirst };
    let standbys = restart_order(is, primary).into_iter().filter(|name| restarted.contains(name)).collect();
    plan.restarts.push(Restart {
        cluster: was.name.clone(),
        standbys,
        primary: primary.filter(|primary| restarted.contains(*primary)).cloned(),
        order,
        ordered_by: if lowered.is_empty() { raised } else { lowered },
    });
}

/// Standbys in the order of their restarts: those that nobody streams from or votes with first, so that an
/// error shows where it costs least.
fn restart_order(cluster: &ClusterSpec, primary: Option<&NodeName>) -> Vec<NodeName> {
    let mut standbys: Vec<&NodeSpec> =
        cluster.nodes.iter().filter(|node| Some(&node.name) != primary).collect();
    let followed =
        |node: &NodeSpec| cluster.nodes.iter().any(|other| other.follow.as_ref() == Some(&node.name));
    standbys
        .sort_by_key(|node| (node.voter_candidate(), node.follow.is_none(), followed(node), node.priority));
    standbys.into_iter().map(|node| node.name.clone()).collect()
}

fn told(durability: &Durability) -> String {
    match durability {
        Durability::Async => "async".to_owned(),
        Durability::Quorum { needed, degrade_after: None } => format!("quorum of {needed}"),
        Durability::Quorum { needed, degrade_after: Some(after) } => {
            format!("quorum of {needed}, degrading after {}", Span(*after))
        }
    }
}

fn source(source: &PostgresSource) -> String {
    match source {
        PostgresSource::Version(version) => format!("version {version}"),
        PostgresSource::BinDir(path) => path.display().to_string(),
    }
}

fn address(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::spec::{DatabaseSpec, OptionValue, Pool, ProxySpec, ProxyTls, TlsMode, WitnessSpec, example};

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    /// The plan for a change of the example, whose primary is `a`, as it is printed.
    fn planned(change: impl FnOnce(&mut HerdSpec)) -> String {
        let old = example();
        let mut new = old.clone();
        change(&mut new);
        assert_eq!(new.check(), [], "the changed specification must be valid");
        plan(&old, &new, |_| Some(name("a"))).to_string()
    }

    fn set(spec: &mut HerdSpec, parameter: &str, value: &str) {
        spec.clusters[0].postgres.parameters.insert(parameter.to_owned(), value.to_owned());
    }

    #[test]
    fn nothing_changes_nothing() {
        assert_eq!(planned(|_| {}), "nothing changes\n");
    }

    #[test]
    fn a_repository_that_votes_stays_where_it_is() {
        use crate::spec::RepositorySpec;
        use crate::spec::backup::Location;

        let backup = |bucket: &str, voter: bool| {
            let url = format!("gs://{bucket}");
            let (endpoint, allow_http, service_account_file) = (None, false, None);
            let location = Location::Gcs { url, endpoint, allow_http, service_account_file };
            let mut backup = BackupSpec::new(RepositorySpec { location, secret: None });
            backup.voter = voter;
            Some(backup)
        };
        let from = |was: Option<BackupSpec>, is: Option<BackupSpec>| {
            let (mut old, mut new) = (example(), example());
            old.clusters[0].backup = was;
            new.clusters[0].backup = is;
            plan(&old, &new, |_| Some(name("a")))
        };
        let taken = from(backup("one", false), backup("one", true));
        assert!(taken.to_string().contains("cluster.main.backup.voter: false -> true"), "{taken}");
        assert!(
            taken.refusals.is_empty() && from(backup("one", true), backup("one", false)).refusals.is_empty()
        );
        for moved in [backup("two", true), backup("two", false), None] {
            let refused = from(backup("one", true), moved).refusals;
            assert_eq!(refused.len(), 1, "{refused:?}");
            assert_eq!(refused[0].why, Refused::RepositoryVotes);
        }
        assert!(from(backup("one", false), backup("two", true)).refusals.is_empty());
    }

    #[test]
    fn settings_cost_what_they_cost() {
        assert_eq!(
            planned(|spec| set(spec, "work_mem", "8MB")),
            "+ cluster.main.postgres.parameters.work_mem = 8MB\n    reload a, b, c, d\n"
        );
        assert_eq!(
            planned(|spec| {
                set(spec, "max_connections", "200");
                set(spec, "shared_buffers", "1GB");
            }),
            "~ cluster.main.postgres.parameters.max_connections: 100 -> 200
    pending on a, b, c, d until restarted
~ cluster.main.postgres.parameters.shared_buffers: 256MB -> 1GB
    pending on a, b, c, d until restarted
to be restarted afterwards, in this order
    restart d, c, b, then switch over from a and restart it
"
        );
        assert_eq!(
            planned(|spec| {
                let parameters = &mut spec.clusters[0].nodes[1].parameters;
                parameters.insert("shared_buffers".to_owned(), "128MB".to_owned());
            }),
            "~ cluster.main.node.b.parameters.shared_buffers: 256MB -> 128MB
    pending on b until restarted
to be restarted afterwards, in this order
    restart b
"
        );
    }

    #[test]
    fn a_lowered_limit_of_standbys_restarts_the_primary_first() {
        let lowered = planned(|spec| set(spec, "max_connections", "50"));
        assert!(
            lowered.ends_with("restart a first and then d, c, b, because max_connections went down\n"),
            "{lowered}"
        );
        // From PostgreSQL's default, which is 8.
        let lowered = planned(|spec| set(spec, "max_worker_processes", "4"));
        assert!(lowered.contains("restart a first"), "{lowered}");
        let both = planned(|spec| {
            set(spec, "max_connections", "50");
            set(spec, "max_worker_processes", "0x10");
        });
        assert!(
            both.contains("refused: ~ cluster.main.postgres.parameters\n    max_worker_processes must be"),
            "{both}"
        );
    }

    #[test]
    fn nodes_come_and_go() {
        assert_eq!(
            planned(|spec| {
                spec.clusters[0].nodes.push(NodeSpec::new(name("e"), "192.168.122.35"));
                spec.clusters[0].nodes.remove(3);
            }),
            "- cluster.main.node.d = 192.168.122.34:5432
    d counts for no commit any more; stop its agent by hand, and mind that it keeps its vote in the store
+ cluster.main.node.e = 192.168.122.35:5432
    e may join with a token; it is cloned, and then may count for commits
"
        );
        let removed = planned(|spec| {
            spec.clusters[0].nodes.remove(0);
        });
        assert_eq!(
            removed,
            "refused: - cluster.main.node.a = 192.168.122.253:5432\n    the node is the primary; pgherd switchover first\n"
        );
        let mut fewer = example();
        fewer.clusters[0].nodes.remove(3);
        let unknown = plan(&example(), &fewer, |_| None);
        assert_eq!(unknown.refusals[0].why, Refused::PrimaryUnknown);
    }

    #[test]
    fn the_primary_stays_one() {
        for (change, why) in
            [(0, Refused::PrimaryNeverPromoted), (1, Refused::PrimaryDelayed), (2, Refused::Address)]
        {
            let mut new = example();
            let node = &mut new.clusters[0].nodes[0];
            match change {
                0 => node.priority = 0,
                1 => node.delay = Some(Duration::from_secs(1)),
                _ => node.port = 5433,
            }
            let plan = plan(&example(), &new, |_| Some(name("a")));
            assert_eq!(plan.refusals.iter().map(|refusal| refusal.why.clone()).collect::<Vec<_>>(), [why]);
            assert_eq!(plan.changes, []);
        }
    }

    #[test]
    fn an_address_that_moves_is_taken_changed_and_given_up() {
        let with = |address: &str, interface: &str| {
            let mut spec = example();
            let (address, interface) = (address.parse().unwrap(), interface.to_owned());
            spec.clusters[0].vip = Some(crate::spec::VipSpec { address, interface });
            spec
        };
        let (one, other) = (with("192.168.122.10/24", "eth0"), with("192.168.122.11/24", "eth1"));
        let planned = |from: &HerdSpec, to: &HerdSpec| plan(from, to, |_| Some(name("a")));
        let taken = planned(&example(), &one);
        assert_eq!(taken.impact(), Impact::Restart, "PostgreSQL listens on its node's address alone");
        assert_eq!(
            taken.to_string(),
            "+ cluster.main.vip = 192.168.122.10/24 on eth0\n    \
             agents need CAP_NET_ADMIN and CAP_NET_RAW; the primary takes the address once PostgreSQL listens on it, \
             which a, b, c, d will after a restart\n\
             to be restarted afterwards, in this order\n    \
             restart d, c, b, then switch over from a and restart it\n"
        );
        let named = |mut spec: HerdSpec| {
            for node in &mut spec.clusters[0].nodes {
                node.host = format!("{}.example.com", node.name);
            }
            spec
        };
        let taken = planned(&named(example()), &named(one.clone()));
        assert_eq!(taken.impact(), Impact::None, "by name it listens on all of them already");
        let moved = planned(&one, &other);
        assert_eq!(moved.impact(), Impact::Restart, "sessions end");
        let effect = "the primary gives the one up and takes the other; connections to the one end";
        assert_eq!(
            moved.to_string(),
            format!(
                "~ cluster.main.vip.address: 192.168.122.10/24 -> 192.168.122.11/24\n    {effect}\n\
                 ~ cluster.main.vip.interface: eth0 -> eth1\n    {effect}\n"
            )
        );
        let dropped = planned(&one, &example());
        assert_eq!(dropped.impact(), Impact::Restart, "sessions end");
        assert!(dropped.to_string().starts_with("- cluster.main.vip = 192.168.122.10/24 on eth0\n"));
    }

    #[test]
    fn everything_else_is_told_with_its_effect() {
        let text = planned(|spec| {
            spec.times.lease = Duration::from_secs(4);
            spec.times.raft_heartbeat = Duration::from_millis(300);
            spec.clusters[0].durability =
                Durability::Quorum { needed: 2, degrade_after: Some(Duration::from_secs(10)) };
            spec.clusters[0].nodes[1].priority = 200;
            spec.clusters[0].nodes[1].read_weight = 0;
            spec.clusters[0].nodes[2].follow = None;
            spec.clusters[0].nodes[3].delay = None;
            spec.clusters[0].postgres.hba = vec!["host all all all scram-sha-256".to_owned()];
            spec.clusters[0].databases =
                vec![DatabaseSpec { name: "shop".parse().unwrap(), owner: "app".parse().unwrap() }];
            spec.clusters[0].proxy = Some(ProxySpec {
                port: 6432,
                pool: Pool::Session,
                pool_size: 30,
                databases: [("shop".to_owned(), Pool::Statement)].into(),
                options: [
                    (ProxyOption::SplitReads, OptionValue::Switch(true)),
                    (ProxyOption::ReadWait, OptionValue::of_time(Some(Duration::from_millis(50)))),
                    (ProxyOption::QueryTimeout, OptionValue::of_time(Some(Duration::from_secs(90)))),
                ]
                .into(),
                console_admins: ["alice".to_owned(), "bob".to_owned()].into(),
                metrics_listen: Some("127.0.0.1:9127".to_owned()),
                tls: ProxyTls {
                    client_mode: TlsMode::Require,
                    client_ca_file: Some("/etc/pgherd/clients.pem".to_owned()),
                    certificate_users: ["anna".to_owned()].into(),
                    ..ProxyTls::default()
                },
                ..ProxySpec::default()
            });
            let host = "192.168.122.41".to_owned();
            spec.witnesses = vec![WitnessSpec { name: name("w2"), host, api_port: 8009 }];
        });
        assert_eq!(
            text,
            r#"~ times.lease: 3s -> 4s
    agents follow it at once
~ times.raft_heartbeat: 200ms -> 300ms
    each agent takes it at its next start
~ cluster.main.durability: quorum of 1 -> quorum of 2, degrading after 10s
    the durability rule changes, without a moment under neither
~ cluster.main.node.b.priority: 100 -> 200
    agents follow it at once
~ cluster.main.node.b.read_weight: 1 -> 0
    proxies follow it within seconds
- cluster.main.node.c.follow = b
    point c at its upstream
- cluster.main.node.d.delay = 5min
    reload d; a delayed node counts for no commit
- cluster.main.postgres.hba = host all all 192.168.122.0/24 scram-sha-256
    reload a, b, c, d
+ cluster.main.postgres.hba = host all all all scram-sha-256
    reload a, b, c, d
~ cluster.main.proxy.port: 9999 -> 6432
    each proxy takes it at its next start
~ cluster.main.proxy.pool: transaction -> session
    holds for clients that connect from now on
~ cluster.main.proxy.pool_size: 20 -> 30
    proxies follow it within seconds
~ cluster.main.proxy.split_reads: false -> true
    proxies follow it within seconds
~ cluster.main.proxy.query_timeout: never -> 90s
    proxies follow it within seconds
+ cluster.main.proxy.console_admins = alice, bob
    proxies follow it within seconds
~ cluster.main.proxy.client_tls_mode: prefer -> require
    proxies follow it within seconds
+ cluster.main.proxy.client_tls_ca_file = /etc/pgherd/clients.pem
    proxies follow it within seconds
+ cluster.main.proxy.certificate_users = anna
    reload a, b, c, d
+ cluster.main.proxy.metrics_listen = 127.0.0.1:9127
    each proxy takes it at its next start
+ cluster.main.proxy.databases.shop = statement
    holds for clients that connect from now on
- cluster.main.database.testix = app
    none: database testix stays; DROP DATABASE removes it
+ witness.w2 = 192.168.122.41
    w2 may join with a token
refused: + cluster.main.database.shop = app
    databases of the file are created with their cluster, and that has been; leave it out of the file, and run CREATE DATABASE "shop" OWNER "app" on the primary
refused: - witness.w = 192.168.122.40
    taking a witness out of the store is not built yet; put it back; a witness that is off costs nothing but its vote
"#
        );
    }

    #[test]
    fn names_majors_and_owners_stay() {
        let text = planned(|spec| {
            spec.name = name("other");
            spec.clusters[0].name = name("second");
            spec.clusters[0].postgres.source = PostgresSource::Version(16);
            spec.clusters[0].databases[0].owner = "other".parse().unwrap();
        });
        for told in [
            "refused: ~ name: shop -> other",
            "refused: ~ cluster.main.name: main -> second",
            "refused: ~ cluster.main.postgres: version 15 -> version 16",
            "run ALTER DATABASE \"testix\" OWNER TO \"other\", then apply the file",
        ] {
            assert!(text.contains(told), "{text}");
        }
        let moved =
            planned(|spec| spec.clusters[0].postgres.source = PostgresSource::BinDir("/opt/pg/bin".into()));
        assert!(moved.contains("version 15 -> /opt/pg/bin\n    pending on a, b, c, d"), "{moved}");
    }

    #[test]
    fn lines_in_another_order_are_a_change() {
        let mut old = example();
        old.clusters[0].postgres.hba.push("host all all all reject".to_owned());
        let mut new = old.clone();
        new.clusters[0].postgres.hba.reverse();
        assert_eq!(plan(&old, &new, |_| None).impact(), Impact::Reload);
    }
}
