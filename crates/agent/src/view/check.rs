//! `pgherd check`: one line for each thing that a monitoring system should know.
//!
//! A check that cannot be made is UNKNOWN, which is not OK. Each has a name that never changes, and where
//! there is a number, the number.

use std::time::Duration;

use pgherd_api::report::{CheckItem, CheckReport, CheckState};
use pgherd_api::status::State;
use pgherd_core::record::BackupOutcome;
use pgherd_core::spec::check::Doubt;
use pgherd_core::spec::times::Span;
use pgherd_core::spec::{BackupSpec, ClusterSpec, NodeSpec, TlsMode};
use pgherd_core::types::NodeName;
use pgherd_dcs::MemberHealth;

use super::{Sight, bytes, names, span, status};
use crate::gossip::Is;

/// A switchover waits for a standby that is further behind, so it is worth knowing before.
const LAG_WARNING_BYTES: u64 = 16 << 20;
/// `wal_keep_size`: past this only a slot keeps the WAL that the standby still needs.
const LAG_CRITICAL_BYTES: u64 = 1 << 30;
/// Reads from a standby that shows the world as it was so long ago surprise people.
const REPLAY_WARNING: Duration = Duration::from_secs(60);
const REPLAY_CRITICAL: Duration = Duration::from_secs(600);
/// An archive that is further behind than this, or than three of its intervals.
const ARCHIVE_LATE: Duration = Duration::from_secs(30);
/// It is renewed when a third of its life is left, so this means that renewing has failed for years.
const CERTIFICATE_WARNING_S: i64 = 30 * 86_400;
const CERTIFICATE_CRITICAL_S: i64 = 7 * 86_400;

/// Where the items of one report go, with what they are about.
struct Report<'a> {
    items: Vec<CheckItem>,
    cluster: Option<&'a NodeName>,
}

impl Report<'_> {
    fn add(&mut self, check: &str, node: Option<&NodeName>, state: CheckState, message: impl Into<String>) {
        self.items.push(CheckItem {
            check: check.to_owned(),
            cluster: self.cluster.map(NodeName::to_string),
            node: node.map(NodeName::to_string),
            state,
            message: message.into(),
            measure: None,
            hint: None,
        });
    }

    /// To the item that was added last.
    fn measured(&mut self, measure: String) {
        if let Some(item) = self.items.last_mut() {
            item.measure = Some(measure);
        }
    }

    fn hinting(&mut self, hint: impl Into<String>) {
        if let Some(item) = self.items.last_mut() {
            item.hint = Some(hint.into());
        }
    }
}

pub(crate) fn check(sight: &Sight<'_>) -> CheckReport {
    let mut report = Report { items: Vec::new(), cluster: None };
    store(sight, &mut report);
    agents(sight, &mut report);
    versions(sight, &mut report);
    certificate(sight, &mut report);
    if let Some(cluster) = sight.cluster() {
        report.cluster = Some(&cluster.name);
        primary(sight, &mut report);
        gate(sight, &mut report);
        commits(sight, cluster, &mut report);
        redundancy(sight, cluster, &mut report);
        fence(sight, &mut report);
        vip(sight, cluster, &mut report);
        archive(sight, cluster, &mut report);
        proxy_servers(cluster, &mut report);
        for node in &cluster.nodes {
            one_node(sight, node, &mut report);
        }
    }
    CheckReport { checks: report.items }
}

/// Whether a member of the store answers, as far as this agent knows.
pub(super) fn store_member_reachable(sight: &Sight<'_>, member: &MemberHealth) -> Option<bool> {
    if member.name == *sight.me() {
        return Some(sight.store.failed.is_none());
    }
    let known = sight.picture.spec.agents().map(|(name, _, _)| name).find(|name| **name == member.name);
    match known.map(|name| sight.seen(name)) {
        Some(seen) if seen.is_heard() => Some(true),
        Some(seen) if seen.age.is_some() => Some(false),
        // Never heard by this agent: then what the store has tried counts.
        _ if member.trouble.is_some() => Some(false),
        _ => member.last_contact.map(|at| at.elapsed() < sight.silence()),
    }
}

fn store(sight: &Sight<'_>, report: &mut Report<'_>) {
    let voters: Vec<&MemberHealth> = sight.store.members.iter().filter(|member| member.voter).collect();
    let silent: Vec<&NodeName> = voters
        .iter()
        .filter(|member| store_member_reachable(sight, member) != Some(true))
        .map(|member| &member.name)
        .collect();
    let there = voters.len() - silent.len();
    let measure = format!("voters={there}/{}", voters.len());
    if let Some(why) = &sight.store.failed {
        report.add(
            "store",
            None,
            CheckState::Critical,
            format!("this node's member of the store has failed: {why}"),
        );
        report.hinting("pgherd logs says more; a lost member joins again with a token");
    } else if there * 2 <= voters.len() && !voters.is_empty() {
        let message = format!("the store has no majority: {} of {} voters answer", there, voters.len());
        report.add("store", None, CheckState::Critical, message);
        report.hinting(format!(
            "bring {} back; if they are gone for good: pgherd store recover",
            names(silent)
        ));
    } else if sight.store.leader.is_none() || !sight.picture.store_reachable {
        report.add("store", None, CheckState::Warning, "the store has no leader at the moment");
    } else if silent.is_empty() {
        let leader = sight.store.leader.as_ref().map(NodeName::as_str).unwrap_or_default();
        report.add(
            "store",
            None,
            CheckState::Ok,
            format!("{there} voters answer, the Raft leader is {leader}"),
        );
    } else {
        let message = format!("{} of {} voters answer; missing: {}", there, voters.len(), names(silent));
        report.add("store", None, CheckState::Warning, message);
    }
    report.measured(measure);
}

fn agents(sight: &Sight<'_>, report: &mut Report<'_>) {
    for (name, _, _) in sight.picture.spec.agents() {
        let seen = sight.seen(name);
        if seen.is_heard() {
            report.add("agent", Some(name), CheckState::Ok, "answers");
            continue;
        }
        let state = if sight.primary() == Some(name) { CheckState::Critical } else { CheckState::Warning };
        report.add("agent", Some(name), state, seen.silence());
        report
            .hinting(format!("on its host: is the agent running, and is its port open from {}?", sight.me()));
    }
}

/// An upgrade that stopped half way, and a node that has not heard of the newest specification.
fn versions(sight: &Sight<'_>, report: &mut Report<'_>) {
    let heard =
        || sight.picture.spec.agents().filter_map(|(name, _, _)| Some((name, sight.seen(name).says?)));
    let own = &sight.picture.own.show;
    let others: Vec<String> = heard()
        .filter(|(_, says)| says.show.version != own.version && !says.show.version.is_empty())
        .map(|(name, says)| format!("{name} runs {}", says.show.version))
        .collect();
    if others.is_empty() {
        report.add("version", None, CheckState::Ok, format!("every agent that answers runs {}", own.version));
    } else {
        let message = format!("{} runs {}; {}", sight.me(), own.version, others.join(", "));
        report.add("version", None, CheckState::Warning, message);
        report.hinting("finish the upgrade: the herd is meant to run one version");
    }
    let behind: Vec<&NodeName> = heard()
        .filter(|(name, says)| {
            *name != sight.me() && says.show.spec_generation < sight.picture.spec_generation
        })
        .map(|(name, _)| name)
        .collect();
    let generation = sight.picture.spec_generation;
    if behind.is_empty() {
        report.add(
            "specification",
            None,
            CheckState::Ok,
            format!("every agent that answers follows generation {generation}"),
        );
    } else {
        let message = format!("{} does not follow generation {generation} yet", names(behind));
        report.add("specification", None, CheckState::Warning, message);
    }
}

fn certificate(sight: &Sight<'_>, report: &mut Report<'_>) {
    let Some(expires) = sight.certificate_expires else {
        let me = Some(sight.me());
        report.add("certificate", me, CheckState::Unknown, "its end is not known");
        return;
    };
    let left_s = expires.as_second() - sight.now.as_second();
    let state = match left_s {
        ..CERTIFICATE_CRITICAL_S => CheckState::Critical,
        CERTIFICATE_CRITICAL_S..CERTIFICATE_WARNING_S => CheckState::Warning,
        _ => CheckState::Ok,
    };
    let message = match u64::try_from(left_s) {
        Ok(left_s) => format!("ends in {} days", left_s / 86_400),
        Err(_) => format!("ended at {expires}"),
    };
    report.add("certificate", Some(sight.me()), state, message);
    report.measured(format!("certificate_seconds={left_s}"));
    if state != CheckState::Ok {
        report.hinting("agents renew theirs in time by themselves: pgherd logs says why this one could not");
    }
}

fn primary(sight: &Sight<'_>, report: &mut Report<'_>) {
    let Some(record) = sight.record() else {
        report.add("primary", None, CheckState::Unknown, "the store has not been read yet");
        return;
    };
    let missing = sight.missing_votes();
    if let Some(election) = &record.election {
        let mut message =
            format!("nobody leads: term {} is being elected ({})", election.term, election.cause);
        if !missing.is_empty() {
            message.push_str(&format!(", and waits for the votes of {}", names(missing.iter().copied())));
        }
        report.add("primary", None, CheckState::Critical, message);
        if !missing.is_empty() {
            report.hinting("pgherd explain says what is at risk, and the command that overrides");
        }
        return;
    }
    let Some(reign) = &record.reign else {
        report.add("primary", None, CheckState::Critical, "the cluster has not had a primary yet");
        return;
    };
    let (holder, term) = (&reign.holder.node, record.term);
    match sight.seen(holder).says {
        None => {
            let message = format!("{holder} holds term {term} and {}", sight.seen(holder).silence());
            report.add("primary", Some(holder), CheckState::Critical, message);
            if !missing.is_empty() {
                report.hinting("pgherd explain says why nobody takes over, and the command that overrides");
            }
        }
        Some(says) if says.running != Is::Primary => {
            let message = format!("{holder} holds term {term}, but {}", says.show.reason);
            report.add("primary", Some(holder), CheckState::Critical, message);
        }
        Some(_) => {
            report.add("primary", Some(holder), CheckState::Ok, format!("{holder} holds term {term}"));
        }
    }
    report.measured(format!("term={term}"));
}

fn gate(sight: &Sight<'_>, report: &mut Report<'_>) {
    if sight.gate_open() {
        report.add("gate", None, CheckState::Ok, "clients may use the primary");
        return;
    }
    let why =
        sight.primary().and_then(|holder| sight.seen(holder).says).map(|says| says.show.reason.as_str());
    let message = match (sight.primary(), why) {
        (Some(holder), Some(why)) => format!("no client is let in: {holder} {why}"),
        _ => "no client is let in".to_owned(),
    };
    report.add("gate", None, CheckState::Critical, message);
}

/// Whether commits are acknowledged, and by how many.
fn commits(sight: &Sight<'_>, cluster: &ClusterSpec, report: &mut Report<'_>) {
    let Some(rule) = sight.rule() else {
        report.add("commits", None, CheckState::Unknown, "there is no durability rule yet");
        return;
    };
    let streaming = sight.voters_streaming();
    let wanted = cluster.durability.needed();
    if wanted == 0 && rule.needed == 0 {
        report.add(
            "commits",
            None,
            CheckState::Ok,
            "asynchronous by the herd file: a failover may lose the last ones",
        );
    } else if sight.degraded() {
        let message =
            format!("degraded: each commit is flushed by {} standbys instead of {wanted}", rule.needed);
        report.add("commits", None, CheckState::Warning, message);
        report.hinting("it ends by itself when a voter is back");
    } else if streaming < rule.needed as usize {
        let message = format!("commits wait: {streaming} of {} needed voters stream", rule.needed);
        report.add("commits", None, CheckState::Critical, message);
        report.hinting("bring a voter back; pgherd explain says why each one does not stream");
    } else {
        let message = format!("each commit is flushed by {} of {streaming} voters", rule.needed);
        report.add("commits", None, CheckState::Ok, message);
    }
    report.measured(format!("voters_streaming={streaming}"));
}

/// Whether one more loss would be survived as well as the herd file wants it.
fn redundancy(sight: &Sight<'_>, cluster: &ClusterSpec, report: &mut Report<'_>) {
    let Some(primary) = sight.primary() else {
        report.add("voters", None, CheckState::Unknown, "nobody leads");
        return;
    };
    if cluster.durability.needed() == 0 {
        report.add("voters", None, CheckState::Ok, "none are needed");
        return;
    }
    let voters = sight.voters();
    let repository = cluster.backup.as_ref().filter(|backup| backup.voter).map(|_| NodeName::repository());
    let without: Vec<&NodeName> = cluster
        .nodes
        .iter()
        // One that is told to stream from another standby does not count while it does.
        .filter(|node| {
            node.voter_candidate() && node.name != *primary && cluster.upstream(node, primary) == primary
        })
        .map(|node| &node.name)
        .chain(repository.as_ref())
        .filter(|name| !voters.iter().any(|voter| voter.node == **name) || !sight.streams(name))
        .collect();
    if without.is_empty() {
        let nodes = names(voters.iter().map(|voter| &voter.node));
        report.add("voters", None, CheckState::Ok, format!("all that may vote do, and stream: {nodes}"));
    } else {
        let message = format!("{} should count for commits, and does not", names(without));
        report.add("voters", None, CheckState::Warning, message);
        report.hinting("pgherd explain says why");
    }
    report.measured(format!("voters={}", voters.len()));
}

fn fence(sight: &Sight<'_>, report: &mut Report<'_>) {
    let Some(primary) = sight.primary() else { return };
    match sight.seen(primary).says.map(|says| says.show.fence_armed) {
        Some(Some(true)) => {
            report.add("fence", Some(primary), CheckState::Ok, "armed");
        }
        Some(_) => {
            let message = "not armed: were this agent to freeze, its PostgreSQL would go on";
            report.add("fence", Some(primary), CheckState::Warning, message);
            report.hinting("the agent tries again by itself; pgherd logs says what fails");
        }
        None => report.add("fence", Some(primary), CheckState::Unknown, "the primary's agent is not heard"),
    }
}

/// Whether the address is where clients are let in, and could be on every other node that may lead.
fn vip(sight: &Sight<'_>, cluster: &ClusterSpec, report: &mut Report<'_>) {
    let Some(wanted) = &cluster.vip else { return };
    let address = wanted.address.address;
    let holders = sight.vip_holders(cluster);
    match (holders.as_slice(), sight.primary()) {
        ([holder], Some(primary)) if *holder == primary => {
            report.add("vip", Some(holder), CheckState::Ok, format!("{wanted}"));
        }
        ([], Some(primary)) if sight.gate_open() => {
            let message = format!("clients are let in on {primary}, and {address} is nowhere");
            report.add("vip", Some(primary), CheckState::Critical, message);
        }
        ([], _) => report.add(
            "vip",
            None,
            CheckState::Critical,
            format!("no client is let in, and {address} is nowhere"),
        ),
        (holders, _) => {
            let message = format!("{address} is said to be on {}", names(holders.iter().copied()));
            report.add("vip", None, CheckState::Critical, message);
        }
    }
    for node in cluster.nodes.iter().filter(|node| node.electable()) {
        if let Some(why) = sight.vip_trouble(&node.name) {
            let leads = sight.primary() == Some(&node.name);
            let state = if leads { CheckState::Critical } else { CheckState::Warning };
            report.add("vip-here", Some(&node.name), state, why);
            report.hinting(
                "pgherd logs of that node says since when; clients reach the primary by its own address",
            );
        }
    }
}

/// Whether what is in the repository could be restored when that was tried last.
fn drill(sight: &Sight<'_>, wanted: &BackupSpec, report: &mut Report<'_>) {
    let last = sight.archive().and_then(|archive| archive.drill.as_ref());
    let Some(last) = last.filter(|_| wanted.drill.is_some()) else { return };
    let began = i64::try_from(last.began_unix_seconds).unwrap_or(i64::MAX);
    let ago = Duration::from_secs(u64::try_from(sight.now.as_second().saturating_sub(began)).unwrap_or(0));
    let backup =
        last.backup.as_deref().map_or_else(|| "a backup".to_owned(), |backup| format!("backup {backup}"));
    match &last.failed {
        None => {
            let message = format!("{backup} was restored {} ago, and all was well", span(ago));
            report.add("drill", Some(&last.node), CheckState::Ok, message);
        }
        Some(why) => {
            let message = format!("restoring {backup} was tried {} ago, and failed: {why}", span(ago));
            report.add("drill", Some(&last.node), CheckState::Critical, message);
            report.hinting("pgherd backup drill tries it again, and tells all of it");
        }
    }
}

/// Whether WAL reaches the repository, and whether there is a base backup to begin with.
fn archive(sight: &Sight<'_>, cluster: &ClusterSpec, report: &mut Report<'_>) {
    let Some(wanted) = &cluster.backup else { return };
    let owner = sight.archive().map(|archive| &archive.owner);
    let says = sight.archive_says();
    let behind = says.and_then(|says| says.behind_ms).map(Duration::from_millis);
    let late = behind
        .is_none_or(|behind| behind > ARCHIVE_LATE.max(wanted.archive_interval.unwrap_or_default() * 3));
    match (sight.archive_trouble(), behind) {
        (Some(trouble), _) => {
            // A moment without an owner is part of each failover.
            let state = if late && owner.is_some() { CheckState::Critical } else { CheckState::Warning };
            report.add("archive", owner, state, trouble);
            report.hinting(
                "pgherd logs of that node says more; WAL is kept by its slot, up to max_slot_wal_keep_size",
            );
        }
        (None, Some(behind)) if late && wanted.archive_interval.is_some() => {
            let message = format!("the repository is {} behind", span(behind));
            report.add("archive", owner, CheckState::Warning, message);
        }
        (None, _) => report.add("archive", owner, CheckState::Ok, "WAL goes into the repository"),
    }
    let Some(says) = says else { return };
    if let [first, ..] = says.gaps.as_slice() {
        let asked = says.asked.as_ref().map_or_else(String::new, |asked| format!("; nobody has it: {asked}"));
        let message = format!("WAL is missing in the repository: {first}{asked}");
        report.add("archive-gaps", None, CheckState::Warning, message);
        report.hinting(
            "moments in it cannot be restored; pgherd backup list shows from when on all can be. All nodes are asked for it every five minutes: a former \
             primary that comes back may have it",
        );
    }
    drill(sight, wanted, report);
    let age = says.newest_began.map(|began| {
        Duration::from_secs(u64::try_from(sight.now.as_second().saturating_sub(began)).unwrap_or(0))
    });
    let failed = sight.archive().and_then(|archive| match &archive.ended.as_ref()?.outcome {
        BackupOutcome::Failed { why } => Some(why),
        BackupOutcome::Complete { .. } => None,
    });
    match (age, failed, wanted.maximum_age) {
        (None, None, _) => {
            report.add("backup", None, CheckState::Warning, "there is no base backup yet");
            report.hinting("the first one is taken by itself as soon as WAL goes into the repository");
        }
        (None, Some(why), _) => {
            let message = format!("there is no base backup, and the last attempt has failed: {why}");
            report.add("backup", None, CheckState::Critical, message);
        }
        (Some(age), _, Some(maximum)) if age > maximum => {
            let message = format!(
                "the newest base backup is {} old, more than maximum_age ({})",
                span(age),
                Span(maximum)
            );
            report.add("backup", None, CheckState::Warning, message);
            report.hinting("pgherd backup create takes one now");
        }
        (Some(_), Some(why), _) => {
            report.add(
                "backup",
                None,
                CheckState::Warning,
                format!("the last attempt at a base backup has failed: {why}"),
            );
        }
        (Some(age), None, _) => {
            report.add(
                "backup",
                None,
                CheckState::Ok,
                format!("the newest base backup is {} old", span(age)),
            );
        }
    }
}

/// Whether proxies know each server for the one that they were led to.
fn proxy_servers(cluster: &ClusterSpec, report: &mut Report<'_>) {
    let Some(proxy) = &cluster.proxy else { return };
    let mode = proxy.tls.server_mode;
    if mode == TlsMode::VerifyFull {
        report.add("proxy-tls", None, CheckState::Ok, "proxies verify each server as the very node");
        return;
    }
    let doubt = Doubt::ServersUnverified { mode };
    report.add("proxy-tls", None, CheckState::Warning, doubt.to_string());
    if let Some(hint) = doubt.hint() {
        report.hinting(format!("server_tls_mode in [proxy]: {hint}"));
    }
}

fn one_node<'a>(sight: &Sight<'a>, node: &'a NodeSpec, report: &mut Report<'_>) {
    let (name, seen) = (&node.name, sight.seen(&node.name));
    if let Some(why) = sight.barred(name) {
        report.add("health", Some(name), CheckState::Critical, format!("barred: {why}"));
        report.hinting(format!("repair it, or make its copy anew: pgherd reinit {name}"));
    }
    // What follows can only be said about a node that speaks; that it does not is said above.
    let Some(says) = seen.says else { return };
    if says.show.pending_restart == Some(true) {
        report.add("restart", Some(name), CheckState::Warning, "a changed parameter waits for a restart");
        report.hinting(format!("when it suits: pgherd restart {name}"));
    }
    if sight.primary() == Some(name) {
        return;
    }
    let state = status::state(sight, seen);
    match state {
        State::Streaming => report.add("replication", Some(name), CheckState::Ok, says.show.reason.clone()),
        State::Stopped | State::Barred | State::Unreachable => {
            report.add("replication", Some(name), CheckState::Critical, says.show.reason.clone());
        }
        _ => report.add("replication", Some(name), CheckState::Warning, says.show.reason.clone()),
    }
    timeline(sight, node, report);
    match status::lag_bytes(sight, seen) {
        None => report.add("lag", Some(name), CheckState::Unknown, "its lag is not known"),
        Some(lag) => {
            let state = match lag {
                LAG_CRITICAL_BYTES.. => CheckState::Critical,
                LAG_WARNING_BYTES.. => CheckState::Warning,
                _ => CheckState::Ok,
            };
            report.add("lag", Some(name), state, format!("{} behind the primary", bytes(lag)));
            report.measured(format!("lag_bytes={lag}"));
        }
    }
    if let Some(ms) = says.show.replay_lag_ms {
        let late = Duration::from_millis(ms).saturating_sub(node.delay.unwrap_or_default());
        let state = match late {
            late if late >= REPLAY_CRITICAL => CheckState::Critical,
            late if late >= REPLAY_WARNING => CheckState::Warning,
            _ => CheckState::Ok,
        };
        let mut message = format!("replay is {} behind", span(Duration::from_millis(ms)));
        if let Some(delay) = node.delay {
            message.push_str(&format!(", {} of which is its delay", span(delay)));
        }
        report.add("replay", Some(name), state, message);
        report.measured(format!("replay_lag_ms={ms}"));
    }
}

/// A standby on another timeline than the primary's follows another history, or has yet to follow this one.
fn timeline<'a>(sight: &Sight<'a>, node: &'a NodeSpec, report: &mut Report<'_>) {
    let (Some(reign), Some(says)) =
        (sight.reign().filter(|reign| reign.promoted), sight.seen(&node.name).says)
    else {
        return;
    };
    let (name, wanted) = (&node.name, reign.timeline);
    match says.timeline {
        Some(found) if found == wanted => {
            report.add("timeline", Some(name), CheckState::Ok, format!("on timeline {found}"));
        }
        Some(found) => {
            let message = format!("on timeline {found}, and the primary is on {wanted}");
            report.add("timeline", Some(name), CheckState::Warning, message);
        }
        None => report.add("timeline", Some(name), CheckState::Unknown, "its timeline is not known"),
    }
}
