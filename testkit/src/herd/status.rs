//! What `pgherd status --json` says, read as any other program would read it.
//!
//! Written down here a second time, from the contract and not from the product's code, so that a field that
//! is renamed or turns from null into zero is noticed.

use serde::Deserialize;

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Status {
    pub herd: String,
    pub generation: u64,
    pub store: Store,
    pub clusters: Vec<Cluster>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Store {
    pub kind: String,
    pub leader: Option<String>,
    pub members: Vec<StoreMember>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct StoreMember {
    pub name: String,
    pub voter: bool,
    pub reachable: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Cluster {
    pub name: String,
    pub system_identifier: Option<String>,
    pub term: Option<u64>,
    pub primary: Option<String>,
    pub gate: String,
    pub durability: Durability,
    pub members: Vec<Member>,
    pub vip: Option<Vip>,
    pub backup: Option<Backup>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Backup {
    pub last: Option<String>,
    pub owner: Option<String>,
    pub repository: String,
    pub wal_lag_seconds: Option<f64>,
    pub gaps: Vec<String>,
    pub trouble: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Vip {
    pub address: String,
    pub interface: String,
    pub holder: Option<String>,
    pub trouble: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Durability {
    pub mode: String,
    pub needed: u32,
    pub voters: Vec<String>,
    pub degraded: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Member {
    pub name: String,
    pub role: String,
    pub state: String,
    pub timeline: Option<u32>,
    pub lsn: Option<String>,
    pub lag_bytes: Option<u64>,
    pub sync: Option<String>,
    pub upstream: Option<String>,
    pub reason: String,
}

impl Status {
    /// The cluster of a herd that has one.
    #[track_caller]
    pub fn cluster(&self) -> &Cluster {
        assert_eq!(self.clusters.len(), 1, "this herd has not one cluster: say which");
        &self.clusters[0]
    }

    /// Whether everything is there: every cluster at full redundancy, every member of the store in reach.
    /// The first thing that is missing, if not.
    pub fn whole(&self) -> Result<(), String> {
        if let Some(gone) = self.store.members.iter().find(|member| member.reachable == Some(false)) {
            return Err(format!("{} of the store cannot be reached", gone.name));
        }
        let Some(leader) = &self.store.leader else {
            return Err("the store has no leader".to_owned());
        };
        // One loss would then be two: of the primary, and of whoever could agree on the next.
        let alone = self.store.members.len() == 1;
        if let Some(cluster) = self.clusters.iter().find(|it| !alone && it.primary.as_ref() == Some(leader)) {
            return Err(format!("the store is led from the node of the primary of {}", cluster.name));
        }
        self.clusters.iter().try_for_each(Cluster::whole)
    }
}

impl Cluster {
    fn whole(&self) -> Result<(), String> {
        let Some(primary) = &self.primary else {
            return Err(format!("cluster {} has no primary", self.name));
        };
        if self.gate != "open" {
            return Err(format!("the gate of cluster {} is {}", self.name, self.gate));
        }
        if self.durability.degraded {
            return Err(format!("cluster {} is degraded", self.name));
        }
        let timeline = self.member(primary).and_then(|member| member.timeline);
        for member in
            self.members.iter().filter(|member| ["primary", "standby", "delayed"].contains(&&*member.role))
        {
            let holds = &member.name == primary;
            let (role, state) =
                if holds { ("primary", "running") } else { (member.role.as_str(), "streaming") };
            if member.role != role || (member.role == "primary") != holds || member.state != state {
                return Err(format!(
                    "{} is {}, {}: {}",
                    member.name, member.role, member.state, member.reason
                ));
            }
            if member.timeline != timeline {
                return Err(format!(
                    "{} is on timeline {:?}, not {timeline:?}",
                    member.name, member.timeline
                ));
            }
            // A cascading standby is fed by one that counts; a delayed one never counts.
            let counts = member.role == "standby" && member.upstream.as_deref() == Some(primary);
            if counts && !self.durability.voters.contains(&member.name) && self.durability.mode == "quorum" {
                return Err(format!("{} is no voter", member.name));
            }
        }
        Ok(())
    }

    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.name == name)
    }

    /// The names of the members with a role, in the order of the herd file.
    pub fn with_role(&self, role: &str) -> Vec<&str> {
        self.members.iter().filter(|member| member.role == role).map(|member| member.name.as_str()).collect()
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let leader = self.store.leader.as_deref().unwrap_or("nobody");
        write!(f, "herd {}, generation {}, store led by {leader}", self.herd, self.generation)?;
        for member in &self.store.members {
            let kind = if member.voter { "voter" } else { "learner" };
            let reach = match member.reachable {
                Some(true) => "in reach",
                Some(false) => "out of reach",
                None => "not tried",
            };
            write!(f, "; {} {kind} {reach}", member.name)?;
        }
        for cluster in &self.clusters {
            let Cluster { name, term, primary, gate, durability, .. } = cluster;
            let primary = primary.as_deref().unwrap_or("none");
            write!(
                f,
                "\ncluster {name}: term {term:?}, primary {primary}, gate {gate}, voters {:?}",
                durability.voters
            )?;
            if durability.degraded {
                f.write_str(", DEGRADED")?;
            }
            if let Some(backup) = &cluster.backup {
                write!(f, "\n  {backup:?}")?;
            }
            for member in &cluster.members {
                let Member { name, role, state, timeline, lsn, sync, upstream, reason, .. } = member;
                write!(f, "\n  {name}: {role}, {state}, timeline {timeline:?}, at {lsn:?}, {sync:?}, ")?;
                write!(f, "from {upstream:?}: {reason}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three nodes at full redundancy, as the contract has it.
    fn whole() -> Status {
        let member = |name: &str| {
            let primary = name == "a";
            serde_json::json!({
                "name": name, "host": "192.0.2.1", "port": 5432,
                "role": if primary { "primary" } else { "standby" },
                "state": if primary { "running" } else { "streaming" },
                "timeline": 4, "lsn": "0/5000060", "lag_bytes": 0, "replay_lag_ms": 0,
                "sync": if primary { "primary" } else { "quorum" },
                "upstream": if primary { None } else { Some("a") },
                "reason": "because", "pending_restart": false,
            })
        };
        serde_json::from_value(serde_json::json!({
            "herd": "shop", "generation": 7,
            "store": {"kind": "raft", "leader": "b", "members": [
                {"name": "a", "voter": true, "reachable": null},
                {"name": "b", "voter": true, "reachable": true},
            ]},
            "clusters": [{
                "name": "main", "system_identifier": "7710", "term": 4, "primary": "a", "gate": "open",
                "durability": {"mode": "quorum", "needed": 1, "voters": ["b", "c"], "degraded": false},
                "members": [member("a"), member("b"), member("c")],
                "backup": null,
            }],
            "proxy": [],
        }))
        .unwrap()
    }

    #[test]
    fn a_herd_is_whole_only_if_nothing_is_missing() {
        assert_eq!(whole().whole(), Ok(()));
        type Damage = (&'static str, fn(&mut Status));
        let damages: [Damage; 10] = [
            ("no leader", |status| status.store.leader = None),
            ("led from the node of the primary", |status| status.store.leader = Some("a".to_owned())),
            ("cannot be reached", |status| status.store.members[0].reachable = Some(false)),
            ("no primary", |status| status.clusters[0].primary = None),
            ("gate of cluster main is closed", |status| status.clusters[0].gate = "closed".into()),
            ("degraded", |status| status.clusters[0].durability.degraded = true),
            ("b is standby, catching up", |status| {
                status.clusters[0].members[1].state = "catching up".into();
            }),
            ("c is no voter", |status| drop(status.clusters[0].durability.voters.pop())),
            ("b is on timeline Some(3)", |status| status.clusters[0].members[1].timeline = Some(3)),
            ("b is primary, running", |status| {
                let member = &mut status.clusters[0].members[1];
                (member.role, member.state) = ("primary".into(), "running".into());
            }),
        ];
        for (expected, damage) in damages {
            let mut status = whole();
            damage(&mut status);
            let missing = status.whole().expect_err(expected);
            assert!(missing.contains(expected), "{missing:?} does not say {expected:?}");
        }
    }

    #[test]
    fn a_cascading_standby_needs_no_vote() {
        let mut status = whole();
        status.clusters[0].members[2].upstream = Some("b".to_owned());
        status.clusters[0].durability.voters.pop();
        assert_eq!(status.whole(), Ok(()));
    }
}
