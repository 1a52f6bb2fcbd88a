//! What people, monitoring and load balancers are shown: pure functions of what the agent knows at one moment.
//!
//! Everything comes from one [`Sight`]: a picture of the agent's mind, the store's own view of itself, and a
//! few facts about this node. What is not known is null here, never 0, and what an agent said once is not
//! repeated after it has fallen silent.
//!
//! Leaves out: asking for the picture and sending the answer ([`crate::backend`]). Nothing decides on what is
//! made here.
//!
//! Hazard: a sentence that is not true, or a check that stays green. A person acts on both.

use std::time::Duration;

use jiff::Timestamp;
use pgherd_core::ha::election::{self, Tally, Waiting};
use pgherd_core::record::{Archive, Record, Reign, Rule};
use pgherd_core::spec::{ClusterSpec, NodeSpec, OptionValue, ProxyOption};
use pgherd_core::types::{Lsn, Member, NodeName};
use pgherd_dcs::Health;

use crate::gossip::{ArchiveShow, Gossip, Is};
use crate::main_loop::Picture;

mod check;
mod explain;
mod health;
mod history;
mod routing;
mod status;
#[cfg(test)]
mod tests;

pub(crate) use check::check;
pub(crate) use explain::explain;
pub(crate) use health::{health, measurements, unknown_health};
pub(crate) use history::history;
pub(crate) use routing::{Routes, routes};
pub(crate) use status::status;

/// Silence of an agent after which what it said last is no longer shown as the present. Twice `suspect`, but
/// not less than this.
const LEAST_SILENCE: Duration = Duration::from_secs(2);

/// All that the views are made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sight<'a> {
    pub(crate) picture: &'a Picture,
    pub(crate) store: &'a Health,
    /// When this node's certificate ends.
    pub(crate) certificate_expires: Option<Timestamp>,
    pub(crate) now: Timestamp,
}

/// One agent as it is seen from here.
#[derive(Clone, Copy, Debug)]
struct Seen<'a> {
    name: &'a NodeName,
    /// Since it was heard; `None`: not since this agent started. Of this agent itself 0.
    age: Option<Duration>,
    /// What it says, if it is heard.
    says: Option<&'a Gossip>,
}

impl Seen<'_> {
    fn is_heard(&self) -> bool {
        self.says.is_some()
    }

    /// "has not been heard …"
    fn silence(&self) -> String {
        match self.age {
            Some(age) => format!("has not been heard for {}", span(age)),
            None => "has not been heard since this agent started".to_owned(),
        }
    }
}

impl<'a> Sight<'a> {
    fn me(&self) -> &'a NodeName {
        &self.picture.own.node
    }

    fn record(&self) -> Option<&'a Record> {
        self.picture.record.as_ref()
    }

    /// The cluster whose record this agent follows.
    fn cluster(&self) -> Option<&'a ClusterSpec> {
        self.picture.spec.cluster(&self.picture.own.cluster)
    }

    fn seen(&self, name: &'a NodeName) -> Seen<'a> {
        if name == self.me() {
            return Seen { name, age: Some(Duration::ZERO), says: Some(&self.picture.own) };
        }
        let Some((_, age, gossip)) = self.picture.peers.iter().find(|(node, _, _)| node == name) else {
            return Seen { name, age: None, says: None };
        };
        let fresh = age.is_some_and(|age| age < self.silence());
        Seen { name, age: *age, says: gossip.as_ref().filter(|_| fresh) }
    }

    /// Does the repository answer anybody, where that votes and was asked?
    fn repository_answers(&self) -> bool {
        let peers = self.picture.peers.iter().filter_map(|(node, ..)| self.seen(node).says);
        peers.chain([&self.picture.own]).any(|says| says.reaches_repository)
    }

    fn silence(&self) -> Duration {
        (self.picture.spec.times.suspect * 2).max(LEAST_SILENCE)
    }

    /// The reign of the open term.
    fn reign(&self) -> Option<&'a Reign> {
        self.record().and_then(Record::open_reign)
    }

    fn primary(&self) -> Option<&'a NodeName> {
        self.reign().map(|reign| &reign.holder.node)
    }

    /// The primary's flush position, if it is heard.
    fn primary_flush(&self) -> Option<Lsn> {
        let says = self.seen(self.primary()?).says?;
        says.flush_lsn.filter(|_| says.running == Is::Primary)
    }

    /// Clients may use the primary. The holder knows it of itself. For the others the record's word counts,
    /// which is there sooner than the next report, and which a dead agent does not take back: it shuts no
    /// client out.
    fn gate_open(&self) -> bool {
        let Some(reign) = self.reign().filter(|reign| reign.gate_opened) else { return false };
        let holder = self.seen(&reign.holder.node);
        match holder.says {
            Some(says) if holder.name == self.me() => says.show.gate_open,
            Some(says) => says.running != Is::Nothing,
            None => true,
        }
    }

    /// The rule that PostgreSQL's list expresses.
    fn rule(&self) -> Option<&'a Rule> {
        Some(self.record()?.rules.as_ref()?.target())
    }

    /// The standbys whose flush counts for a commit, wherever the primary is.
    fn voters(&self) -> Vec<&'a Member> {
        let Some((rule, record)) = self.rule().zip(self.record()) else { return Vec::new() };
        let holder = record.holder().map(|holder| &holder.node);
        rule.members.iter().filter(|member| Some(&member.node) != holder).collect()
    }

    /// Of those, the ones that are there and stream.
    fn voters_streaming(&self) -> usize {
        self.voters().iter().filter(|voter| self.streams(&voter.node)).count()
    }

    fn streams(&self, name: &'a NodeName) -> bool {
        if name.is_repository() {
            return self.archive_says().is_some_and(|says| says.votes);
        }
        self.seen(name).says.is_some_and(|says| says.show.state == Some(pgherd_api::status::State::Streaming))
    }

    /// Fewer voters than the operator asked for, because `degrade_after` says so.
    fn degraded(&self) -> bool {
        let wanted = self.cluster().map_or(0, |cluster| cluster.durability.needed());
        self.rule().is_some_and(|rule| (rule.needed as usize) < wanted)
    }

    /// The archive, if it is that of the specification.
    fn archive(&self) -> Option<&'a Archive> {
        let wanted = self.cluster()?.backup.as_ref()?.repository.location.to_string();
        self.record()?.archive.as_ref().filter(|archive| archive.place == wanted)
    }

    /// What its owner says of it.
    fn archive_says(&self) -> Option<&'a ArchiveShow> {
        self.seen(&self.archive()?.owner).says?.show.archive.as_ref()
    }

    /// From when to when any moment can be restored, in seconds since 1970.
    fn recovery_window(&self) -> Option<(i64, i64)> {
        let says = self.archive_says()?;
        let behind = i64::try_from(says.behind_ms?.div_ceil(1000)).ok()?;
        Some((says.window_from?, self.now.as_second().saturating_sub(behind).max(says.window_from?)))
    }

    /// Why WAL does not go on into the repository.
    fn archive_trouble(&self) -> Option<String> {
        let Some(archive) = self.archive() else {
            self.cluster()?.backup.as_ref()?;
            return Some("nobody streams WAL into the repository yet".to_owned());
        };
        let owner = &archive.owner;
        match self.seen(owner) {
            seen if !seen.is_heard() => {
                Some(format!("{owner}, which streams WAL into it, {}", seen.silence()))
            }
            seen => match &seen.says?.show.archive {
                None => Some(format!("{owner} does not stream WAL into it at the moment")),
                Some(show) => show.trouble.as_ref().map(|trouble| format!("{owner}: {trouble}")),
            },
        }
    }

    /// The nodes that say they have this cluster's address.
    fn vip_holders(&self, cluster: &'a ClusterSpec) -> Vec<&'a NodeName> {
        let names = cluster.nodes.iter().map(|node| &node.name);
        names.filter(|name| self.seen(name).says.is_some_and(|says| says.show.vip.held.is_some())).collect()
    }

    /// What is wrong with the address on one node's host.
    fn vip_trouble(&self, name: &'a NodeName) -> Option<String> {
        let vip = &self.seen(name).says?.show.vip;
        let claimed = vip.claimed_by.as_ref().filter(|_| vip.held.is_some());
        match (&vip.trouble, claimed) {
            (Some(why), _) => Some(why.clone()),
            (None, Some(station)) => {
                Some(format!("the station {station} says that it has the address as well"))
            }
            (None, None) => None,
        }
    }

    fn barred(&self, name: &NodeName) -> Option<&'a str> {
        self.record()?.nodes.get(name)?.barred.as_deref()
    }

    /// May this standby serve reads? A row that it shows must not be lost by a failover: under `needed` = 1
    /// whatever a voter has is on two members, itself and the primary; what it passes on, too. Where nothing
    /// is needed nothing is promised; where more than one is, one standby alone proves nothing. Those who would rather
    /// read, say so.
    fn in_read_pool(&self, node: &NodeSpec) -> bool {
        let Some((rule, cluster)) = self.rule().zip(self.cluster()) else { return false };
        if node.delay.is_some() || self.barred(&node.name).is_some() || self.primary() == Some(&node.name) {
            return false;
        }
        if self.record().is_some_and(|record| record.is_restored(&node.name)) {
            // What it shows is of an earlier moment.
            return false;
        }
        let votes = |name: &NodeName| self.voters().iter().any(|voter| voter.node == *name);
        match rule.needed {
            0 => true,
            _ if cluster.proxy_option(ProxyOption::UnconfirmedReads) == OptionValue::Switch(true) => true,
            1 => {
                let mut at = &node.name;
                // No longer than there are nodes, whatever they say about each other.
                for _ in &cluster.nodes {
                    if votes(at) {
                        return true;
                    }
                    match self.picture.spec_node_upstream(at, self) {
                        Some(upstream) => at = upstream,
                        None => return false,
                    }
                }
                false
            }
            _ => false,
        }
    }

    /// Whose votes an open election waits for; or, while the holder is silent and none can be opened, whose it
    /// would need. Empty where nothing waits.
    fn missing_votes(&self) -> Vec<&'a NodeName> {
        let Some(record) = self.record() else { return Vec::new() };
        let named = |missing: &std::collections::BTreeSet<NodeName>| {
            record.nodes.keys().filter(|node| missing.contains(*node)).collect()
        };
        if record.election.is_some() {
            return match election::tally(record, true) {
                Tally::Wait(Waiting::Votes { missing }) => named(&missing),
                Tally::Wait(Waiting::Forced { named: node }) => named(&[node].into()),
                _ => Vec::new(),
            };
        }
        let Some(holder) = record.holder().filter(|holder| !self.seen(&holder.node).is_heard()) else {
            return Vec::new();
        };
        let is_heard = |node: &&'a NodeName| match node.is_repository() {
            true => self.repository_answers(),
            false => self.seen(node).is_heard(),
        };
        let heard = record.nodes.keys().filter(is_heard).cloned().collect();
        if election::winnable(record, &heard) {
            return Vec::new();
        }
        let needed = record.rules.iter().flat_map(|rules| rules.in_force()).flat_map(|rule| &rule.members);
        let silent: std::collections::BTreeSet<NodeName> = needed
            .chain([holder])
            .map(|member| member.node.clone())
            .filter(|node| !heard.contains(node))
            .collect();
        named(&silent)
    }

    /// The node that an operator would make primary by force: of those that are there, the one that holds the
    /// most.
    fn best_survivor(&self) -> Option<&'a NodeName> {
        let cluster = self.cluster()?;
        let votes = self.record()?.election.as_ref().map(|election| &election.votes);
        let candidates = cluster.nodes.iter().filter(|node| {
            node.electable() && self.barred(&node.name).is_none() && self.seen(&node.name).is_heard()
        });
        let rank = |node: &&NodeSpec| {
            let vote = votes.and_then(|votes| votes.get(&node.name)).map(|vote| vote.position);
            let says = self.seen(&node.name).says.and_then(|says| says.holds);
            (vote.max(says), node.priority, std::cmp::Reverse(node.name.clone()))
        };
        candidates.max_by_key(rank).map(|node| &node.name)
    }
}

impl Picture {
    /// Whom a node says it streams from.
    fn spec_node_upstream<'a>(&'a self, node: &NodeName, sight: &Sight<'a>) -> Option<&'a NodeName> {
        let name = self.spec.agents().map(|(name, _, _)| name).find(|name| *name == node)?;
        sight.seen(name).says?.show.upstream.as_ref()
    }
}

/// As people say it: `800 ms`, `12 s`, `3 min`, `5 h`.
fn span(span: Duration) -> String {
    let s = span.as_secs();
    match s {
        0 => format!("{} ms", span.as_millis()),
        1..120 => format!("{s} s"),
        120..7200 => format!("{} min", s / 60),
        _ => format!("{} h", s / 3600),
    }
}

/// `16 MiB`, for messages; measures carry the exact number.
fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if value < 10.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

/// The repository has no name that an operator has given it.
fn called(name: &NodeName) -> &str {
    if name.is_repository() { "the repository" } else { name.as_str() }
}

/// `a`, `a and b`, `a, b and c`.
fn names<'n>(names: impl IntoIterator<Item = &'n NodeName>) -> String {
    let names: Vec<&str> = names.into_iter().map(called).collect();
    match names.as_slice() {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

fn milliseconds(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
