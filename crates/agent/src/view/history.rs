//! `pgherd history`: the lines that the record keeps, with what a program may want to know about each.
//!
//! The record keeps codes and sentences ([`crate::history`]); whom each one names is read off here. A test
//! makes every line there is and reads it back, so that neither side changes alone.

use jiff::Timestamp;
use pgherd_api::report::{Event, History, HistoryEntry, HistoryQuery};
use pgherd_core::record::{self, Record};
use pgherd_core::types::NodeName;

const BOOTSTRAP: &str = "election-bootstrap";
const SWITCHOVER: &str = "election-switchover";

/// The record holds no more than this anyway.
const MOST: usize = record::EVENTS_MAX;

pub(crate) fn history(cluster: &NodeName, record: &Record, query: &HistoryQuery) -> History {
    let mut reader = Reader::default();
    let mut entries: Vec<HistoryEntry> =
        record.events.iter().map(|event| reader.entry(cluster, record, event)).collect();
    let limit = query.limit.map_or(MOST, |limit| usize::try_from(limit).unwrap_or(MOST));
    entries.drain(..entries.len().saturating_sub(limit));
    History { entries }
}

/// What earlier lines say about later ones.
#[derive(Default)]
struct Reader {
    holder: Option<String>,
    cause: Option<String>,
    forced: bool,
    /// Voters that each commit needed when the term was closed; `None`: no line has said so.
    needed: Option<u32>,
}

impl Reader {
    fn entry(&mut self, cluster: &NodeName, record: &Record, event: &record::Event) -> HistoryEntry {
        let mut entry = HistoryEntry {
            at: i64::try_from(event.unix_seconds)
                .ok()
                .and_then(|seconds| Timestamp::from_second(seconds).ok())
                .map_or_else(String::new, |at| at.to_string()),
            cluster: cluster.to_string(),
            event: Event::Unknown,
            term: Some(event.term.0),
            timeline: None,
            from: None,
            to: None,
            reason_code: event.code.clone(),
            reason: event.text.clone(),
            lost_transactions: None,
            lost_bytes: None,
            write_gap_ms: None,
            operator: None,
        };
        match Line::read(&event.code, &event.text) {
            Line::Made { node } => {
                entry.event = Event::Bootstrap;
                entry.to = Some(node.to_owned());
            }
            Line::NewCopy { node } => {
                entry.event = Event::Reclone;
                entry.to = Some(node.to_owned());
            }
            Line::Opened => {
                entry.event = Event::Election;
                entry.from.clone_from(&self.holder);
                self.cause = Some(event.code.clone());
                self.forced = false;
            }
            Line::Forced { to } => {
                entry.event = Event::ForcedFailover;
                (entry.from, entry.to) = (self.holder.clone(), Some(to.to_owned()));
                self.forced = true;
            }
            Line::ForceVoid => {
                entry.event = Event::ForcedFailover;
                entry.from.clone_from(&self.holder);
                self.forced = false;
            }
            Line::Leads { node } => self.leads(node, record, event, &mut entry),
            Line::GoesOn { node } => {
                entry.event = Event::Election;
                (entry.from, entry.to) = (Some(node.to_owned()), Some(node.to_owned()));
                entry.lost_transactions = Some(0);
                self.holder = Some(node.to_owned());
            }
            Line::Promoted { node, timeline } => {
                entry.event = Event::Promoted;
                (entry.to, entry.timeline) = (Some(node.to_owned()), timeline);
            }
            Line::GateOpened => {
                entry.event = Event::GateOpened;
                entry.to.clone_from(&self.holder);
            }
            Line::Rule { needed } => {
                entry.event = match (self.needed, needed) {
                    (Some(before), Some(now)) if now < before => Event::Degraded,
                    (Some(before), Some(now)) if now > before => Event::Restored,
                    _ => Event::RuleChanged,
                };
                self.needed = needed.or(self.needed);
            }
            Line::RuleUndone => entry.event = Event::RuleChanged,
            Line::Barred { node } => {
                entry.event = Event::Barred;
                entry.to = Some(node.to_owned());
            }
            Line::Unbarred { node } => {
                entry.event = Event::Unbarred;
                entry.to = Some(node.to_owned());
            }
            Line::SwitchoverAsked { to } => {
                entry.event = Event::Switchover;
                (entry.from, entry.to) = (self.holder.clone(), to.map(str::to_owned));
            }
            Line::SwitchoverCancelled => entry.event = Event::Switchover,
            Line::Other => {}
        }
        entry
    }

    fn leads(&mut self, node: &str, record: &Record, event: &record::Event, entry: &mut HistoryEntry) {
        let is = |cause: &str| self.cause.as_deref() == Some(cause);
        entry.event = if self.forced {
            Event::ForcedFailover
        } else if is(BOOTSTRAP) {
            Event::Bootstrap
        } else if is(SWITCHOVER) {
            Event::Switchover
        } else {
            Event::Failover
        };
        // Every acknowledged commit was on enough members for the winner to have it; unless an operator said
        // that it need not be so, or none was needed.
        let promised = self.needed.is_some_and(|needed| needed > 0) && !self.forced;
        entry.lost_transactions = (promised || is(BOOTSTRAP)).then_some(0);
        entry.timeline = record.lines.iter().find(|line| line.term == event.term).map(|line| line.timeline.0);
        (entry.from, entry.to) = (self.holder.take(), Some(node.to_owned()));
        self.holder = Some(node.to_owned());
    }
}

/// A line of [`crate::history`], taken apart: its code says what it is, its sentence whom it is about.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Made {
        node: &'a str,
    },
    NewCopy {
        node: &'a str,
    },
    Opened,
    Forced {
        to: &'a str,
    },
    ForceVoid,
    Leads {
        node: &'a str,
    },
    GoesOn {
        node: &'a str,
    },
    Promoted {
        node: &'a str,
        timeline: Option<u32>,
    },
    GateOpened,
    Rule {
        needed: Option<u32>,
    },
    RuleUndone,
    Barred {
        node: &'a str,
    },
    Unbarred {
        node: &'a str,
    },
    SwitchoverAsked {
        to: Option<&'a str>,
    },
    SwitchoverCancelled,
    /// Of a later version.
    Other,
}

impl<'a> Line<'a> {
    fn read(code: &str, text: &'a str) -> Line<'a> {
        let node = text.split(' ').next().unwrap_or_default();
        let after = |before: &str| text.split_once(before).and_then(|(_, rest)| rest.split(' ').next());
        match code {
            "founded" => Line::Made { node },
            "enlisted" => Line::NewCopy { node },
            "forced" => after(" forced ").map_or(Line::Other, |to| Line::Forced { to }),
            "restore-leads" => after(" had ").map_or(Line::Other, |to| Line::Forced { to }),
            "force-void" => Line::ForceVoid,
            "elected" => Line::Leads { node },
            "incumbent" => Line::GoesOn { node },
            "promoted" => Line::Promoted {
                node,
                timeline: after(" on timeline ").and_then(|number| number.parse().ok()),
            },
            "gate-opened" => Line::GateOpened,
            "rule-changed" => {
                Line::Rule { needed: after("durability rule: ").and_then(|number| number.parse().ok()) }
            }
            "rule-undone" => Line::RuleUndone,
            "barred" => Line::Barred { node },
            "unbarred" => Line::Unbarred { node },
            "switchover-asked" => Line::SwitchoverAsked { to: after(" switchover to ") },
            "switchover-cancelled" => Line::SwitchoverCancelled,
            _ if code.starts_with("election-") => Line::Opened,
            _ => Line::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use pgherd_core::record::{Cause, Position, Proposal, Rule, Standing, Switchover, Vote};
    use pgherd_core::types::{Incarnation, Lsn, SystemId, Term, Timeline};

    use super::*;
    use crate::history::line;

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    fn vote(member: &str, standing: Standing) -> Proposal {
        Proposal::Vote {
            term: Term(1),
            vote: Vote {
                member: member.parse().unwrap(),
                standing,
                position: Position { term: Term(0), lsn: Lsn(16) },
                timeline: Timeline(1),
                begins: Vec::new(),
                electable: true,
                priority: 100,
            },
        }
    }

    /// A cluster's life by real proposals: each sentence is made by the code that makes it in a herd.
    fn life() -> Record {
        let open = |term, cause, by: &str, released| Proposal::Open {
            term: Term(term),
            cause,
            by: name(by),
            released,
            poisoned: false,
        };
        let vote_in = |term, member: &str, standing| match vote(member, standing) {
            Proposal::Vote { vote, .. } => Proposal::Vote { term: Term(term), vote },
            _ => unreachable!(),
        };
        let rule = |needed, members: &[&str]| Rule {
            needed,
            members: members.iter().map(|member| member.parse().unwrap()).collect(),
        };
        let mut record = Record::empty();
        let mut at = 1_800_000_000;
        let mut step = |record: &mut Record, proposal: Proposal| {
            let mut after =
                record.apply(&proposal).unwrap_or_else(|refusal| panic!("{proposal:?}: {refusal}"));
            if let Some((code, text)) = line(record, &after, &proposal) {
                after.note(at, code, text);
            }
            at += 1;
            *record = after;
        };
        let finish = |record: &Record, rule: &Rule| Proposal::FinishRule {
            term: record.term,
            rule: rule.clone(),
            change: record.rules.as_ref().unwrap().change,
        };
        step(&mut record, Proposal::Found { node: name("a") });
        step(&mut record, Proposal::Founded { node: name("a"), system: SystemId(7), needed: 1 });
        step(&mut record, open(0, Cause::Bootstrap, "a", false));
        step(&mut record, vote_in(1, "a_1", Standing::Sealed));
        step(&mut record, Proposal::Promoted { term: Term(1), begin: Lsn(32), at: Lsn(48) });
        step(&mut record, Proposal::Enlist { node: name("b"), from: Incarnation(0) });
        let both = rule(1, &["a_1", "b_2"]);
        step(&mut record, Proposal::ProposeRule { term: Term(1), rule: both.clone() });
        let proof = finish(&record, &both);
        step(&mut record, proof);
        step(&mut record, Proposal::GateOpened { term: Term(1) });
        step(&mut record, open(1, Cause::AgentSilent, "b", false));
        step(&mut record, vote_in(2, "a_1", Standing::Running));
        let order = Switchover { term: Term(2), to: Some(name("b")) };
        step(&mut record, Proposal::Switchover { order: Some(order.clone()) });
        step(&mut record, Proposal::Switchover { order: None });
        step(&mut record, Proposal::Switchover { order: Some(Switchover { to: None, ..order }) });
        step(&mut record, open(2, Cause::Switchover, "a", true));
        step(&mut record, vote_in(3, "b_2", Standing::Sealed));
        step(&mut record, Proposal::Promoted { term: Term(3), begin: Lsn(64), at: Lsn(72) });
        let alone = rule(0, &["b_2"]);
        step(&mut record, Proposal::ProposeRule { term: Term(3), rule: alone.clone() });
        step(&mut record, Proposal::UndoRule { term: Term(3) });
        let proof = finish(&record, &both);
        step(&mut record, proof);
        step(&mut record, Proposal::ProposeRule { term: Term(3), rule: alone.clone() });
        let proof = finish(&record, &alone);
        step(&mut record, proof);
        step(&mut record, Proposal::Bar { node: name("a"), why: Some("a checksum failed".to_owned()) });
        step(&mut record, Proposal::Bar { node: name("a"), why: None });
        step(&mut record, Proposal::Force { term: Term(3), to: name("b"), by: name("a") });
        step(&mut record, Proposal::Unvote { term: Term(4), node: name("b") });
        step(&mut record, Proposal::Force { term: Term(3), to: name("a"), by: name("a") });
        step(&mut record, vote_in(4, "a_1", Standing::Sealed));
        step(&mut record, Proposal::Decide { term: Term(4), winner: name("a"), patient: true });
        record
    }

    #[test]
    fn every_sentence_of_a_life_is_understood() {
        let record = life();
        let history = history(&name("main"), &record, &HistoryQuery::default());
        let told: Vec<String> = history
            .entries
            .iter()
            .map(|entry| {
                let name = |name: &Option<String>| name.clone().unwrap_or("-".to_owned());
                let lost = entry.lost_transactions.map_or("?".to_owned(), |lost| lost.to_string());
                let term = entry.term.unwrap();
                format!(
                    "{} {:?} {}>{} term {term} lost {lost}",
                    entry.reason_code,
                    entry.event,
                    name(&entry.from),
                    name(&entry.to)
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                "founded Bootstrap ->a term 0 lost ?",
                "election-bootstrap Election ->- term 0 lost ?",
                "elected Bootstrap ->a term 1 lost 0",
                "promoted Promoted ->a term 1 lost ?",
                "enlisted Reclone ->b term 1 lost ?",
                "rule-changed RuleChanged ->- term 1 lost ?",
                "gate-opened GateOpened ->a term 1 lost ?",
                "election-agent-silent Election a>- term 1 lost ?",
                "incumbent Election a>a term 2 lost 0",
                "switchover-asked Switchover a>b term 2 lost ?",
                "switchover-cancelled Switchover ->- term 2 lost ?",
                "switchover-asked Switchover a>- term 2 lost ?",
                "election-switchover Election a>- term 2 lost ?",
                "elected Switchover a>b term 3 lost 0",
                "promoted Promoted ->b term 3 lost ?",
                "rule-undone RuleChanged ->- term 3 lost ?",
                "rule-changed RuleChanged ->- term 3 lost ?",
                "rule-changed Degraded ->- term 3 lost ?",
                "barred Barred ->a term 3 lost ?",
                "unbarred Unbarred ->a term 3 lost ?",
                "forced ForcedFailover b>b term 3 lost ?",
                "force-void ForcedFailover b>- term 3 lost ?",
                "forced ForcedFailover b>a term 3 lost ?",
                "elected ForcedFailover b>a term 4 lost ?",
            ]
        );
        assert!(history.entries.iter().all(|entry| entry.at.starts_with("2027-01-15T08:")));
        let promoted = history.entries.iter().find(|entry| entry.event == Event::Promoted).unwrap();
        assert_eq!(promoted.timeline, Some(3));
    }

    #[test]
    fn the_newest_are_kept_when_fewer_are_asked_for() {
        let query = HistoryQuery { limit: Some(2), ..HistoryQuery::default() };
        let history = history(&name("main"), &life(), &query);
        let codes: Vec<&str> = history.entries.iter().map(|entry| entry.reason_code.as_str()).collect();
        assert_eq!(codes, ["forced", "elected"]);
    }
}
