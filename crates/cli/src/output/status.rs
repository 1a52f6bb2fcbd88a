//! A herd's status for people: what holds, in sentences, and each node in one line.
//!
//! Leaves out: judging it. `pgherd check` is for that; here only what already is a state gets a colour.

use std::collections::BTreeSet;

use pgherd_api::status::{
    Backup, Cluster, Durability, DurabilityMode, Gate, Member, ProxyTarget, Restore, Role, State, Status,
    Store, StoreKind, Sync, Vip,
};

use super::numbers::{bytes, counted, listed, span};
use super::style::{Style, Tone, plain};
use super::table::{Cell, Table};

pub(crate) fn lines(status: &Status, style: Style) -> Vec<String> {
    let mut lines = vec![
        format!(
            "herd {}  {}",
            style.paint(Tone::Strong, &plain(&status.herd)),
            style.paint(Tone::Faint, &format!("specification {}", status.generation))
        ),
        store(&status.store, style),
    ];
    for cluster in &status.clusters {
        lines.push(String::new());
        lines.extend(self::cluster(cluster, style));
    }
    for proxy in &status.proxy {
        let target = match proxy.target {
            ProxyTarget::ReadWrite => "read and write",
            ProxyTarget::ReadOnly => "read only",
        };
        lines.push(format!("proxy  {} for {}, {target}", plain(&proxy.listen), plain(&proxy.cluster)));
    }
    lines
}

fn store(store: &Store, style: Style) -> String {
    let kind = match store.kind {
        StoreKind::Raft => "raft",
        StoreKind::Etcd => "etcd",
    };
    let names = |wanted: &dyn Fn(&&pgherd_api::status::StoreMember) -> bool| -> Vec<String> {
        store.members.iter().filter(wanted).map(|member| plain(&member.name)).collect()
    };
    let leader = match &store.leader {
        Some(leader) => format!("leader {}", plain(leader)),
        None => style.paint(Tone::Bad, "no leader known"),
    };
    let mut text =
        format!("store  {kind}, {leader}, voters {}", listed(&names(&|member| member.voter), "and"));
    let learning = names(&|member| !member.voter);
    if !learning.is_empty() {
        text.push_str(&format!(", {} without a vote", listed(&learning, "and")));
    }
    let silent = names(&|member| member.reachable == Some(false));
    if !silent.is_empty() {
        let told = format!("; no answer from {}", listed(&silent, "and"));
        text.push_str(&style.paint(Tone::Bad, &told));
    }
    text
}

fn cluster(cluster: &Cluster, style: Style) -> Vec<String> {
    let gate = match cluster.gate {
        Gate::Open => style.paint(Tone::Good, "open for clients"),
        Gate::Closed => style.paint(Tone::Bad, "closed for clients"),
        Gate::Draining => style.paint(Tone::Doubtful, "handing over, new transactions wait"),
    };
    let primary = match &cluster.primary {
        Some(primary) => format!("primary {}", style.paint(Tone::Strong, &plain(primary))),
        None => style.paint(Tone::Bad, "no primary"),
    };
    let term = cluster.term.map_or("term unknown".to_owned(), |term| format!("term {term}"));
    let system =
        cluster.system_identifier.as_deref().map_or(String::new(), |id| format!("  system {}", plain(id)));
    let name = style.paint(Tone::Strong, &plain(&cluster.name));
    let mut lines = vec![
        format!("cluster {name}  {gate}  {primary}  {term}{}", style.paint(Tone::Faint, &system)),
        durability(cluster.primary.as_deref(), &cluster.durability, style),
    ];
    lines.extend(cluster.vip.iter().flat_map(|known| vip(known, style)));
    lines.extend(members(&cluster.members, style));
    lines.extend(cluster.backup.as_ref().map(backup));
    lines.extend(
        cluster.restore.as_ref().map(|wanted| style.paint(Tone::Doubtful, &restore(&cluster.name, wanted))),
    );
    lines
}

/// The cluster is to go back, and waits for a copy or for somebody's word.
fn restore(cluster: &str, restore: &Restore) -> String {
    let (node, cluster) = (plain(&restore.node), plain(cluster));
    let moment = format!("{} on timeline {}", plain(&restore.end_lsn), restore.timeline);
    if restore.held {
        return format!(
            "restore {node} is held at {moment}: pgherd restore --cluster {cluster} --lead has it lead, --let-go gives it up"
        );
    }
    let trouble = restore
        .trouble
        .as_deref()
        .map_or(String::new(), |why| format!("; the last attempt failed: {}", plain(why)));
    format!("restore {node} is taken back to {moment}{trouble}")
}

/// As which a repository is among the voters.
const REPOSITORY: &str = "pgherd_repository";

/// What an acknowledged commit has been through, in one sentence.
fn durability(primary: Option<&str>, durability: &Durability, style: Style) -> String {
    let called = |voter: &String| match voter.as_str() {
        REPOSITORY => "the repository".to_owned(),
        voter => plain(voter),
    };
    let voters: Vec<String> = durability.voters.iter().map(called).collect();
    let needed = durability.needed as usize;
    let holder = primary.map_or("the primary".to_owned(), plain);
    match durability.mode {
        DurabilityMode::Async => style.paint(
            Tone::Doubtful,
            &format!("a commit is acknowledged by {holder} alone; a failover may lose the last ones"),
        ),
        DurabilityMode::Quorum if durability.degraded => style.paint(
            Tone::Bad,
            &format!(
                "degraded: a commit is acknowledged with fewer than the {needed} needed standbys, until one is back"
            ),
        ),
        DurabilityMode::Quorum if voters.len() < needed => style.paint(
            Tone::Bad,
            &format!("commits wait: each needs {}, and {} can give it", counted(needed, "standby", "standbys"), voters.len()),
        ),
        DurabilityMode::Quorum if voters.len() == needed => {
            format!("a commit is acknowledged once {holder} and {} have flushed it", listed(&voters, "and"))
        }
        DurabilityMode::Quorum => {
            format!("a commit is acknowledged once {holder} and {needed} of {} have flushed it", listed(&voters, "and"))
        }
    }
}

fn vip(vip: &Vip, style: Style) -> Vec<String> {
    let place = match &vip.holder {
        Some(holder) => format!("is on {}, {}", plain(holder), plain(&vip.interface)),
        None => style.paint(Tone::Bad, "is on no node"),
    };
    let trouble = vip.trouble.iter().map(|why| style.paint(Tone::Doubtful, &plain(why)));
    [format!("address {} {place}", plain(&vip.address))].into_iter().chain(trouble).collect()
}

fn members(members: &[Member], style: Style) -> Vec<String> {
    let mut table =
        Table::new(&["NODE", "ROLE", "STATE", "SYNC", "TL", "FLUSHED", "LAG", "REPLAY", "ADDRESS", "WHY"]);
    for (depth, member) in as_tree(members) {
        let unknown = || "–".to_owned();
        let address = match member.port {
            Some(port) if member.host.contains(':') => format!("[{}]:{port}", member.host),
            Some(port) => format!("{}:{port}", member.host),
            None => member.host.clone(),
        };
        let mut why = member.reason.clone();
        if member.pending_restart == Some(true) {
            why.push_str("; a changed parameter waits for a restart");
        }
        let branch = if depth == 0 { String::new() } else { format!("{}└ ", "  ".repeat(depth - 1)) };
        table.row(vec![
            Cell::new(format!("{branch}{}", member.name)).toned(Tone::Strong),
            Cell::new(role_text(member.role)),
            Cell::new(state_text(member.state)).toned(state_tone(member.state)),
            Cell::new(member.sync.map_or(unknown(), |sync| sync_text(sync).to_owned())),
            Cell::new(member.timeline.map_or(unknown(), |timeline| timeline.to_string())).right(),
            Cell::new(member.lsn.clone().unwrap_or_else(unknown)).right(),
            Cell::new(member.lag_bytes.map_or(unknown(), bytes)).right(),
            Cell::new(member.replay_lag_ms.map_or(unknown(), span)).right(),
            Cell::new(address),
            Cell::new(why),
        ]);
    }
    table.lines(style)
}

/// Each member below the one it streams from, with its depth; those that stream from nobody known first.
fn as_tree(members: &[Member]) -> Vec<(usize, &Member)> {
    let mut placed = Vec::with_capacity(members.len());
    let mut seen = BTreeSet::new();
    let is_known = |name: &str| members.iter().any(|member| member.name == name);
    let is_root = |member: &&Member| !member.upstream.as_deref().is_some_and(is_known);
    let primaries_first = |member: &&Member| member.role != Role::Primary;
    let mut roots: Vec<&Member> = members.iter().filter(is_root).collect();
    roots.sort_by_key(primaries_first);
    for root in roots {
        place(members, root, 0, &mut placed, &mut seen);
    }
    // Reports of different moments can name each other as upstream; nobody is left out for that.
    for member in members {
        place(members, member, 0, &mut placed, &mut seen);
    }
    placed
}

fn place<'a>(
    members: &'a [Member],
    member: &'a Member,
    depth: usize,
    placed: &mut Vec<(usize, &'a Member)>,
    seen: &mut BTreeSet<&'a str>,
) {
    if !seen.insert(&member.name) {
        return;
    }
    placed.push((depth, member));
    for below in members.iter().filter(|below| below.upstream.as_deref() == Some(&member.name)) {
        place(members, below, depth + 1, placed, seen);
    }
}

fn backup(backup: &Backup) -> String {
    let window = match &backup.recovery_window {
        Some(window) => {
            format!("any moment from {} to {} can be restored", plain(&window.from), plain(&window.to))
        }
        None => "nothing can be restored yet".to_owned(),
    };
    let last =
        backup.last.as_deref().map_or(String::new(), |last| format!(", newest base backup {}", plain(last)));
    let lag =
        backup.wal_lag_seconds.map_or(String::new(), |lag| format!(", the archive is {lag:.1} s behind"));
    let mut text = format!("backup  {window}{last}{lag}");
    if let Some(running) = &backup.running {
        let done = match (running.done_bytes, running.total_bytes) {
            (Some(done), Some(total)) => format!(", {} of {}", bytes(done), bytes(total)),
            _ => String::new(),
        };
        let held = running.held_back_to.map_or_else(String::new, |to| {
            format!(", held back to {} a second for the server's clients", bytes(to))
        });
        text.push_str(&format!(
            "\n        a base backup of {} is under way{done}{held}",
            plain(&running.node)
        ));
    }
    if let Some(trouble) = &backup.trouble {
        text.push_str(&format!("\n        {}", plain(trouble)));
    }
    if let Some(failed) = backup.ended.as_ref().and_then(|ended| ended.failed.as_ref()) {
        text.push_str(&format!("\n        the last attempt at a base backup failed: {}", plain(failed)));
    }
    if let Some(drill) = &backup.drill {
        let what = match &drill.failed {
            None => format!("passed in {}", span(drill.seconds.saturating_mul(1000))),
            Some(failed) => format!("failed: {}", plain(failed)),
        };
        text.push_str(&format!(
            "\n        the drill of {} on {} {what}",
            plain(&drill.at),
            plain(&drill.node)
        ));
    }
    for gap in &backup.gaps {
        text.push_str(&format!("\n        WAL is missing: {}", plain(gap)));
    }
    if let Some(asked) = backup.asked.as_ref().filter(|_| !backup.gaps.is_empty()) {
        text.push_str(&format!("\n        nobody has it: {}", plain(asked)));
    }
    if let Some(filled) = &backup.filled {
        let files = if filled.files == 1 { "a file".to_owned() } else { format!("{} files", filled.files) };
        let from = plain(&filled.from.join(", "));
        text.push_str(&format!(
            "\n        {files} of WAL that was missing came from {from} at {}",
            plain(&filled.at)
        ));
    }
    text
}

pub(crate) fn role_text(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Standby => "standby",
        Role::Delayed => "delayed",
        Role::Witness => "witness",
        Role::Keeper => "keeper",
    }
}

pub(crate) fn state_text(state: State) -> &'static str {
    match state {
        State::Initializing => "initializing",
        State::Starting => "starting",
        State::Running => "running",
        State::Streaming => "streaming",
        State::CatchingUp => "catching up",
        State::Promoting => "promoting",
        State::Rewinding => "rewinding",
        State::Cloning => "cloning",
        State::Paused => "paused",
        State::Stopped => "stopped",
        State::Unreachable => "unreachable",
        State::Barred => "barred",
    }
}

fn state_tone(state: State) -> Tone {
    match state {
        State::Running | State::Streaming => Tone::Good,
        State::Stopped | State::Unreachable | State::Barred => Tone::Bad,
        _ => Tone::Doubtful,
    }
}

fn sync_text(sync: Sync) -> &'static str {
    match sync {
        Sync::Primary => "primary",
        Sync::Quorum => "quorum",
        Sync::Potential => "potential",
        Sync::Async => "async",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Three nodes, c behind b.
    pub(crate) fn example() -> Status {
        let text = r#"{"herd":"shop","generation":7,
          "store":{"kind":"raft","leader":"b","members":[
            {"name":"a","voter":true,"reachable":true},{"name":"b","voter":true,"reachable":true},
            {"name":"c","voter":true,"reachable":false}]},
          "clusters":[{"name":"main","system_identifier":"7710","term":4,"primary":"a","gate":"open",
            "durability":{"mode":"quorum","needed":1,"voters":["b"],"degraded":false},
            "members":[
              {"name":"c","host":"127.0.0.1","port":21008,"role":"standby","state":"catching up","timeline":4,
               "lsn":"0/4000060","lag_bytes":16777216,"replay_lag_ms":null,"sync":"async","upstream":"b",
               "reason":"streams from b","pending_restart":false},
              {"name":"a","host":"127.0.0.1","port":21000,"role":"primary","state":"running","timeline":4,
               "lsn":"0/5000060","lag_bytes":0,"replay_lag_ms":0,"sync":"primary","upstream":null,
               "reason":"holds term 4","pending_restart":false},
              {"name":"b","host":"127.0.0.1","port":21004,"role":"standby","state":"streaming","timeline":4,
               "lsn":"0/5000060","lag_bytes":0,"replay_lag_ms":3,"sync":"quorum","upstream":"a",
               "reason":"streams from a","pending_restart":true}],
            "backup":null}],"proxy":[]}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_herd_in_lines() {
        let expected = "\
herd shop  specification 7
store  raft, leader b, voters a, b and c; no answer from c

cluster main  open for clients  primary a  term 4  system 7710
a commit is acknowledged once a and b have flushed it
NODE   ROLE     STATE        SYNC     TL    FLUSHED     LAG  REPLAY  ADDRESS          WHY
a      primary  running      primary   4  0/5000060     0 B    0 ms  127.0.0.1:21000  holds term 4
└ b    standby  streaming    quorum    4  0/5000060     0 B    3 ms  127.0.0.1:21004  streams from a; a changed parameter waits for a restart
  └ c  standby  catching up  async     4  0/4000060  16 MiB       –  127.0.0.1:21008  streams from b";
        assert_eq!(lines(&example(), Style::PLAIN).join("\n"), expected);
    }

    #[test]
    fn where_the_address_is_and_what_is_in_its_way() {
        let mut status = example();
        let trouble = vec!["b: there is no interface eth0 on this host".to_owned()];
        let (address, interface) = ("192.0.2.9/24".to_owned(), "eth0".to_owned());
        let known = Vip { address, interface, holder: Some("a".to_owned()), trouble };
        status.clusters[0].vip = Some(known.clone());
        let text = lines(&status, Style::PLAIN).join("\n");
        let told = "\naddress 192.0.2.9/24 is on a, eth0\nb: there is no interface eth0 on this host\nNODE ";
        assert!(text.contains(told), "{text}");
        status.clusters[0].vip = Some(Vip { holder: None, trouble: Vec::new(), ..known });
        assert!(lines(&status, Style::PLAIN).contains(&"address 192.0.2.9/24 is on no node".to_owned()));
    }

    #[test]
    fn a_cluster_that_goes_back_says_what_it_waits_for() {
        let mut status = example();
        let wanted = Restore {
            node: "c".to_owned(),
            backup: "20261120T205454".to_owned(),
            end_lsn: "0/4000060".to_owned(),
            timeline: 3,
            held: false,
            trouble: Some("no space is left".to_owned()),
        };
        status.clusters[0].restore = Some(wanted.clone());
        let text = lines(&status, Style::PLAIN).join("\n");
        let told =
            "\nrestore c is taken back to 0/4000060 on timeline 3; the last attempt failed: no space is left";
        assert!(text.ends_with(told), "{text}");
        status.clusters[0].restore = Some(Restore { held: true, trouble: None, ..wanted });
        let text = lines(&status, Style::PLAIN).join("\n");
        let told = "c is held at 0/4000060 on timeline 3: pgherd restore --cluster main --lead has it lead";
        assert!(text.contains(told), "{text}");
    }

    #[test]
    fn members_that_name_each_other_as_upstream_are_all_shown() {
        let mut members = example().clusters.remove(0).members;
        for (member, upstream) in members.iter_mut().zip(["b", "b", "c"]) {
            member.upstream = Some(upstream.to_owned());
        }
        assert_eq!(as_tree(&members).len(), 3);
    }

    #[test]
    fn the_sentence_says_what_a_commit_is_worth() {
        let said = |change: &dyn Fn(&mut Durability)| {
            let mut rule = example().clusters.remove(0).durability;
            change(&mut rule);
            durability(Some("a"), &rule, Style::PLAIN)
        };
        assert!(said(&|rule| rule.voters.push("c".into())).ends_with("a and 1 of b and c have flushed it"));
        let repository = said(&|rule| rule.voters.push("pgherd_repository".into()));
        assert!(repository.ends_with("a and 1 of b and the repository have flushed it"), "{repository}");
        assert!(
            said(&|rule| rule.voters.clear())
                .starts_with("commits wait: each needs 1 standby, and 0 can give it")
        );
        assert!(said(&|rule| rule.degraded = true).starts_with("degraded"));
        assert!(said(&|rule| rule.mode = DurabilityMode::Async).contains("may lose the last ones"));
    }
}
