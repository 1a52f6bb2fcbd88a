//! A receiver whose reports commits wait for: the repository is a member of the durability rule.
//!
//! An object is put; *after* that has ended it is asked whether somebody has sealed the repository for a later term; and only behind the
//! answer that nobody has, what was put may be reported. Whoever seals looks what is there after that: so what was reported is in the vote.
//!
//! An answer that was lost is none: the object is put again, and then it is asked again. One object is under way at a time, so that an answer is that to
//! a question behind everything that is reported with it. What was there in the beginning is reported behind a question of its own.
//!
//! It stays on its timeline: another one is another order. Left out: asking ([`crate::voter`]). Hazard: a report before the answer is a commit that
//! an election does not see.

use std::time::Duration;

use pgherd_core::types::{Instant, Lsn};

use super::{Pieces, Receiver, State, Ticket};
use crate::breakage::{Broken, broken};

/// Whether the repository is sealed above the term of the stream; asked behind everything that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question(Ticket);

/// What came of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    NotSealed,
    /// It ends here: nothing more may be reported, or put.
    Sealed,
    /// Nobody knows.
    Lost,
}

#[derive(Debug)]
pub(super) struct Voting {
    /// What may be reported.
    told: Lsn,
    asks: Asks,
    is_sealed: bool,
}

/// Where the question is that belongs to what was put last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    Nothing,
    Wanted,
    Begun(Question),
}

impl Voting {
    pub(super) fn told(&self) -> Lsn {
        self.told
    }

    /// Whether another object may be put.
    pub(super) fn may_put(&self) -> bool {
        self.asks == Asks::Nothing && !self.is_sealed
    }

    /// An object was put.
    pub(super) fn ask(&mut self) {
        self.asks = Asks::Wanted;
    }
}

impl Receiver {
    /// For a stream in whose name commits are confirmed: what came is put at once, one object at a time, and reported behind a question.
    pub fn as_voter(self) -> Receiver {
        let voting = Voting { told: Lsn::ZERO, asks: Asks::Wanted, is_sealed: false };
        let pieces = Pieces { every: Duration::ZERO, next: Instant::from_boot(Duration::ZERO) };
        Receiver { voting: Some(voting), pieces: Some(pieces), ..self }
    }

    /// The question that is to be asked now. It is given out once, unless it comes to be asked again.
    pub fn next_question(&mut self) -> Option<Question> {
        let voting =
            self.voting.as_mut().filter(|voting| voting.asks == Asks::Wanted && !voting.is_sealed)?;
        self.tickets += 1;
        let question = Question(Ticket(self.tickets));
        voting.asks = Asks::Begun(question);
        Some(question)
    }

    pub fn answered(&mut self, question: Question, answer: Answer) {
        let Some(voting) = self.voting.as_mut().filter(|voting| voting.asks == Asks::Begun(question)) else {
            return;
        };
        match answer {
            Answer::NotSealed => {
                voting.asks = Asks::Nothing;
                self.settle();
                if let Some(voting) = &mut self.voting {
                    voting.told = self.durable;
                }
            }
            Answer::Sealed => voting.is_sealed = true,
            Answer::Lost => {
                let mut again = self.puts.iter_mut().filter(|put| put.state == State::Durable);
                voting.asks = match again.next() {
                    Some(put) => {
                        put.state = State::Wanted;
                        Asks::Nothing
                    }
                    None => Asks::Wanted,
                };
            }
        }
    }

    /// Whether somebody has sealed the repository above its term: the connection ends without another report.
    pub fn is_sealed(&self) -> bool {
        self.voting.as_ref().is_some_and(|voting| voting.is_sealed)
    }

    /// What a receiver would report that does not ask.
    pub(super) fn told_unasked(&self) -> Option<Lsn> {
        if !broken(Broken::ReportBeforeQuestion) {
            return None;
        }
        let put = self.puts.iter().take_while(|put| put.state == State::Durable).map(|put| put.end);
        Some(put.fold(self.durable, Lsn::max))
    }
}
