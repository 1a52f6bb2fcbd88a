//! The times of the failover protocol and the relations between them that its argument needs.
//!
//! What an operator may set is a field of [`Times`]; what follows from PostgreSQL or from the protocol
//! itself is a constant beside it. Nothing here measures: the caller compares [`Instant`](crate::types::Instant)s.
//!
//! Hazard: a relation that does not hold turns a slow moment into a failover, or lets an old primary answer
//! reads after the gate of the next one has opened. So [`Times::check`] runs on every way into the store.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A standby that has not let go of its receiver after this long is killed and sealed dead.
pub const SEAL_DEADLINE: Duration = Duration::from_millis(300);
/// How long the decision of an election that was opened on suspicion waits for the holder's own vote.
pub const HOLDER_VOTE_WAIT: Duration = Duration::from_millis(200);
/// After this long without enough votes an election says for whom it waits.
pub const VOTES_WAIT: Duration = Duration::from_secs(1);
/// From an immediate stop of PostgreSQL to SIGKILL.
pub const KILL_AFTER: Duration = Duration::from_secs(1);
/// A primary without a proof starts stopping this long before the end of its lease, to be gone at the end.
pub const STOP_BEFORE_LEASE_END: Duration = Duration::from_secs(1);
/// A trivial command on a standing connection, by every voter on the primary.
pub const PROBE_EVERY: Duration = Duration::from_millis(250);
/// A probe by a new connection, and one that writes and syncs on the volume of the WAL.
pub const DEEP_PROBE_EVERY: Duration = Duration::from_secs(1);
/// A deep probe without an answer after this long has failed.
pub const DEEP_PROBE_DEADLINE: Duration = Duration::from_secs(2);

/// What `[times]` in the herd file sets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    /// For how long after its proof a primary may serve reads and a proxy may use a routing table.
    #[serde(rename = "lease_ms", with = "super::millis")]
    pub lease: Duration,
    /// How often a holder renews its term in the store, and commits a heartbeat.
    #[serde(rename = "renew_ms", with = "super::millis")]
    pub renew: Duration,
    /// Silence of the holder's agent after which the voters' own probes count.
    #[serde(rename = "suspect_ms", with = "super::millis")]
    pub suspect: Duration,
    /// Silence of an agent after which its PostgreSQL is taken out of service, however healthy.
    #[serde(rename = "agent_grace_ms", with = "super::millis")]
    pub agent_grace: Duration,
    #[serde(rename = "raft_heartbeat_ms", with = "super::millis")]
    pub raft_heartbeat: Duration,
    /// A member of the store that has heard nothing from the Raft leader stands for election after this at most.
    #[serde(rename = "raft_election_ms", with = "super::millis")]
    pub raft_election: Duration,
}

impl Default for Times {
    fn default() -> Times {
        Times {
            lease: Duration::from_secs(3),
            renew: Duration::from_millis(500),
            suspect: Duration::from_millis(1500),
            agent_grace: Duration::from_secs(10),
            raft_heartbeat: Duration::from_millis(200),
            raft_election: Duration::from_secs(2),
        }
    }
}

/// The fields of [`Times`], by their names in the herd file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Time {
    Lease,
    Renew,
    Suspect,
    AgentGrace,
    RaftHeartbeat,
    RaftElection,
}

impl Time {
    pub const ALL: [Time; 6] =
        [Time::Lease, Time::Renew, Time::Suspect, Time::AgentGrace, Time::RaftHeartbeat, Time::RaftElection];

    pub fn key(self) -> &'static str {
        match self {
            Time::Lease => "lease",
            Time::Renew => "renew",
            Time::Suspect => "suspect",
            Time::AgentGrace => "agent_grace",
            Time::RaftHeartbeat => "raft_heartbeat",
            Time::RaftElection => "raft_election",
        }
    }

    /// The least and the greatest value that makes sense on any network.
    pub fn bounds(self) -> (Duration, Duration) {
        let (least_ms, most_ms) = match self {
            Time::Lease => (1_500, 60_000),
            Time::Renew => (50, 10_000),
            Time::Suspect => (200, 30_000),
            Time::AgentGrace => (2_000, 600_000),
            Time::RaftHeartbeat => (20, 5_000),
            Time::RaftElection => (200, 60_000),
        };
        (Duration::from_millis(least_ms), Duration::from_millis(most_ms))
    }
}

/// Why a set of times is refused. Durations are told as the file tells them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TimesError {
    OutOfBounds { time: Time, is: Duration, least: Duration, most: Duration },
    RenewTooSlow { renew: Duration, lease: Duration },
    NoRoomToStop { renew: Duration, lease: Duration },
    SuspectBeforeTwoRenewals { suspect: Duration, renew: Duration },
    SuspectNotBeforeLease { suspect: Duration, lease: Duration },
    GraceNotAfterLease { agent_grace: Duration, lease: Duration },
    RaftHeartbeatTooSlow { heartbeat: Duration, election: Duration },
    RaftElectionOutlivesLease { election: Duration, lease: Duration },
}

impl TimesError {
    /// The key to point at.
    pub fn time(&self) -> Time {
        match self {
            TimesError::OutOfBounds { time, .. } => *time,
            TimesError::RenewTooSlow { .. } => Time::Renew,
            TimesError::NoRoomToStop { .. } => Time::Lease,
            TimesError::SuspectBeforeTwoRenewals { .. } | TimesError::SuspectNotBeforeLease { .. } => {
                Time::Suspect
            }
            TimesError::GraceNotAfterLease { .. } => Time::AgentGrace,
            TimesError::RaftHeartbeatTooSlow { .. } => Time::RaftHeartbeat,
            TimesError::RaftElectionOutlivesLease { .. } => Time::RaftElection,
        }
    }
}

impl fmt::Display for TimesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TimesError::OutOfBounds { time, is, least, most } => {
                let key = time.key();
                write!(f, "{key} is {}, outside {} to {}", Span(*is), Span(*least), Span(*most))
            }
            TimesError::RenewTooSlow { renew, lease } => write!(
                f,
                "renew is {}, more than a third of lease ({}): two lost renewals would end a healthy lease",
                Span(*renew),
                Span(*lease)
            ),
            TimesError::NoRoomToStop { renew, lease } => write!(
                f,
                "lease is {}: a primary starts stopping {} before its end, which leaves no room for two renewals \
                 {} apart",
                Span(*lease),
                Span(STOP_BEFORE_LEASE_END),
                Span(*renew)
            ),
            TimesError::SuspectBeforeTwoRenewals { suspect, renew } => write!(
                f,
                "suspect is {}, less than two renewals ({} each): one lost message would look like a dead agent",
                Span(*suspect),
                Span(*renew)
            ),
            TimesError::SuspectNotBeforeLease { suspect, lease } => write!(
                f,
                "suspect is {}, not less than lease ({}): reads would stop before anyone looks for a new primary",
                Span(*suspect),
                Span(*lease)
            ),
            TimesError::GraceNotAfterLease { agent_grace, lease } => write!(
                f,
                "agent_grace is {}, not more than lease ({}): restarting an agent would cost a failover",
                Span(*agent_grace),
                Span(*lease)
            ),
            TimesError::RaftHeartbeatTooSlow { heartbeat, election } => write!(
                f,
                "raft_heartbeat is {}, more than a quarter of raft_election ({}): two lost heartbeats would unseat \
                 the Raft leader",
                Span(*heartbeat),
                Span(*election)
            ),
            TimesError::RaftElectionOutlivesLease { election, lease } => write!(
                f,
                "raft_election is {}, not less than lease ({}): a change of the Raft leader would end leases",
                Span(*election),
                Span(*lease)
            ),
        }
    }
}

impl std::error::Error for TimesError {}

impl Times {
    pub fn get(&self, time: Time) -> Duration {
        match time {
            Time::Lease => self.lease,
            Time::Renew => self.renew,
            Time::Suspect => self.suspect,
            Time::AgentGrace => self.agent_grace,
            Time::RaftHeartbeat => self.raft_heartbeat,
            Time::RaftElection => self.raft_election,
        }
    }

    pub fn set(&mut self, time: Time, to: Duration) {
        *match time {
            Time::Lease => &mut self.lease,
            Time::Renew => &mut self.renew,
            Time::Suspect => &mut self.suspect,
            Time::AgentGrace => &mut self.agent_grace,
            Time::RaftHeartbeat => &mut self.raft_heartbeat,
            Time::RaftElection => &mut self.raft_election,
        } = to;
    }

    /// What a gate waits beyond `lease`, for clocks that run at different rates. Oscillators of servers stay
    /// within 500 ppm of each other; one part in fifty leaves room for a badly steered virtual clock.
    pub fn clock_margin(&self) -> Duration {
        self.lease / 50
    }

    /// Every relation that does not hold. A value out of its own bounds is told alone, without the relations
    /// that it breaks as a consequence.
    pub fn check(&self) -> Vec<TimesError> {
        let strays = Time::ALL.into_iter().filter_map(|time| {
            let (is, (least, most)) = (self.get(time), time.bounds());
            (is < least || is > most).then_some(TimesError::OutOfBounds { time, is, least, most })
        });
        let strays: Vec<TimesError> = strays.collect();
        if !strays.is_empty() {
            return strays;
        }
        let Times { lease, renew, suspect, agent_grace, .. } = *self;
        let (heartbeat, election) = (self.raft_heartbeat, self.raft_election);
        let relations = [
            (renew * 3 <= lease, TimesError::RenewTooSlow { renew, lease }),
            (STOP_BEFORE_LEASE_END + renew * 2 <= lease, TimesError::NoRoomToStop { renew, lease }),
            (suspect >= renew * 2, TimesError::SuspectBeforeTwoRenewals { suspect, renew }),
            (suspect < lease, TimesError::SuspectNotBeforeLease { suspect, lease }),
            (agent_grace > lease, TimesError::GraceNotAfterLease { agent_grace, lease }),
            (heartbeat * 4 <= election, TimesError::RaftHeartbeatTooSlow { heartbeat, election }),
            (election < lease, TimesError::RaftElectionOutlivesLease { election, lease }),
        ];
        relations.into_iter().filter(|(holds, _)| !holds).map(|(_, error)| error).collect()
    }
}

/// A duration as the herd file writes it: the largest unit that divides it, `1500ms`, `3s`, `5min`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")];
        match units.into_iter().find(|(unit_ms, _)| ms >= *unit_ms && ms.is_multiple_of(*unit_ms)) {
            Some((unit_ms, unit)) => write!(f, "{}{unit}", ms / unit_ms),
            None => write!(f, "{ms}ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_hold_every_relation() {
        assert_eq!(Times::default().check(), []);
    }

    #[test]
    fn each_relation_is_refused_by_its_own_key_and_says_why() {
        let ms = Duration::from_millis;
        let cases = [
            (Time::Renew, ms(1_001), "two lost renewals"),
            (Time::Lease, ms(1_900), "no room for two renewals"),
            (Time::Suspect, ms(999), "one lost message"),
            (Time::Suspect, ms(3_000), "reads would stop"),
            (Time::AgentGrace, ms(3_000), "restarting an agent"),
            (Time::RaftHeartbeat, ms(501), "two lost heartbeats"),
            (Time::RaftElection, ms(3_000), "a change of the Raft leader"),
            (Time::Renew, ms(49), "outside 50ms to 10s"),
            (Time::AgentGrace, ms(3_600_000), "outside 2s to 10min"),
        ];
        for (time, value, why) in cases {
            let mut times = Times::default();
            times.set(time, value);
            assert_eq!(times.get(time), value);
            let errors = times.check();
            let told = errors.iter().find(|error| error.to_string().contains(why));
            assert_eq!(told.map(TimesError::time), Some(time), "{value:?} for {time:?} gave {errors:?}");
        }
    }

    #[test]
    fn spans_are_told_in_the_unit_that_divides_them() {
        let told = [(0, "0ms"), (500, "500ms"), (1_500, "1500ms"), (60_000, "1min"), (5_400_000, "90min")];
        for (ms, text) in told {
            assert_eq!(Span(Duration::from_millis(ms)).to_string(), text);
        }
    }
}
